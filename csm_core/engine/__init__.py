"""Many requests through one model: request, sampling, scheduler, runner and the loop. Knows no text and no voices."""

from csm_core.train.data import written_whole


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "00000.npz"
    try:
        with written_whole(file) as handle:
            handle.write(b"half")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert not list(tmp_path.glob("*.npz"))
    for content in (b"first", b"second"):
        with written_whole(file) as handle:
            handle.write(content)
        assert file.read_bytes() == content

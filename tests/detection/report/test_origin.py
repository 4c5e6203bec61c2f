import pytest

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.report.origin import add_origin, read_origin


def test_every_start_of_a_sweep_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "-m", "data.ids=[1, 2]"])
    assert read_origin(tmp_path) == []
    add_origin(tmp_path, {"test": "4 images"}, [("align", 0)])
    add_origin(tmp_path, {"test": "4 images"}, [("align", 0), ("pool", 0)])
    first, second = read_origin(tmp_path)
    assert first["command"] == "python train.py -m 'data.ids=[1, 2]'", "can be pasted into a shell"
    assert (first["runs"], second["runs"]) == ([["align", 0]], [["align", 0], ["pool", 0]])
    assert first["data"] == {"test": "4 images"} and {"python", "torch", "numba"} <= set(first["versions"])


@pytest.mark.parametrize("content", ['[{"command": "x", "ru', "{}", '[{"command": "x"}]', "[5]"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "origin.json").write_text(content)
    with pytest.raises(InputError, match=r"origin\.json .*Restore or remove it"):
        read_origin(tmp_path)

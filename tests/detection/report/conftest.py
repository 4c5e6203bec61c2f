import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of words and numbers: figures are there with their captions, and empty."""
    monkeypatch.setattr("roi_quantization.detection.report.write.render", lambda *_, **__: b"<svg/>")

import pytest

from roi_quantization.detection.runs.command_line import replace_null_choices
from tests.configuration import composed


def test_null_for_a_group_is_hydras_removal_and_settings_stay():
    given = ["logger=null", "average=null", "hydra/launcher=null", "seed=null", "data.val=null", "-m", "roi=pool", "=null", "../docs=null"]
    expected = ["~logger", "~average", "~hydra/launcher", "seed=null", "data.val=null", "-m", "roi=pool", "=null", "../docs=null"]
    assert replace_null_choices(given) == expected


@pytest.mark.parametrize("group", ["logger", "average", "coco_eval"])
def test_the_group_is_left_out(group):
    assert composed("train", *replace_null_choices([f"{group}=null"])).get(group) is None

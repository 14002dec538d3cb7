"""The catalogue of accelerators: complete, sourced, and forgiving about names but not about unknown ones."""

from __future__ import annotations

import pytest

from servingtiers.catalog.accelerators import accelerator, accelerators
from servingtiers.catalog.names import UnknownNameError

REQUIRED = (
    "a100-pcie-40gb",
    "a100-pcie-80gb",
    "a100-sxm-40gb",
    "a100-sxm-80gb",
    "h100-pcie-80gb",
    "h100-sxm-80gb",
    "h100-nvl-94gb",
    "h200-sxm-141gb",
    "b200-sxm-180gb",
    "l40s-48gb",
    "l4-24gb",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_every_required_accelerator_is_there_under_its_key(key):
    assert accelerator(key).key == key


@pytest.mark.parametrize(
    ("alias", "key"),
    [
        ("H100", "h100-sxm-80gb"),
        ("h100-sxm5-80gb", "h100-sxm-80gb"),
        ("NVIDIA-H100-80GB-HBM3", "h100-sxm-80gb"),
        ("NVIDIA-A100-SXM4-80GB", "a100-sxm-80gb"),
        ("nvidia a100 80gb pcie", "a100-pcie-80gb"),
        ("h100_sxm", "h100-sxm-80gb"),
        ("L4", "l4-24gb"),
        ("NVIDIA-H200", "h200-sxm-141gb"),
        ("H100 SXM", "h100-sxm-80gb"),
        ("NVIDIA H100", "h100-sxm-80gb"),
        ("NVIDIA H100 SXM5", "h100-sxm-80gb"),
        ("H100_80GB_HBM3", "h100-sxm-80gb"),
        ("A100-80GB", "a100-sxm-80gb"),
        ("A100 (80GB)", "a100-sxm-80gb"),
        ("A100 80GB SXM4", "a100-sxm-80gb"),
        ("A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA L40S", "l40s-48gb"),
    ],
)
def test_usual_names_and_device_plugin_labels_are_aliases(alias, key):
    assert accelerator(alias).key == key


def test_an_unknown_name_is_one_line_with_near_names_and_every_key():
    with pytest.raises(UnknownNameError) as caught:
        accelerator("h100-smx-80gb")
    message = str(caught.value)
    assert "\n" not in message
    assert "h100-sxm-80gb" in caught.value.near
    assert all(entry.key in message for entry in accelerators())


@pytest.mark.parametrize("name", ["", "nvidia", "80gb", "sxm", "a100 24gb", "h100 h200", "NVIDIA GPU"])
def test_words_that_fit_no_card_or_several_are_refused(name):
    with pytest.raises(UnknownNameError):
        accelerator(name)


def test_keys_and_aliases_are_unique():
    names = [name.lower() for entry in accelerators() for name in (entry.key, *entry.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("entry", accelerators(), ids=lambda entry: entry.key)
def test_each_entry_is_complete_and_sourced(entry):
    assert entry.sources
    assert all(source.startswith("https://") for source in entry.sources)
    assert "laceholder" in entry.price_source
    assert entry.price_per_hour_usd > 0.0
    assert entry.memory_gib > 0.0
    assert entry.link_gb_s > 0.0
    assert entry.gpus_per_node >= 1
    assert entry.tflops["bf16"] > 0.0
    # Narrower types are never slower, and no dense figure is a sparse one by mistake (4x would be).
    for dtype, most in (("fp8", 2.2), ("int8", 2.2), ("int4", 4.5)):
        if entry.supports(dtype):
            assert 1.0 <= entry.tflops[dtype] / entry.tflops["bf16"] <= most
    if entry.calibrated_as is not None:
        assert accelerator(entry.calibrated_as).calibrated_as is None


def test_the_published_peaks_that_people_check_first():
    assert accelerator("a100-pcie-80gb").bandwidth_gb_s == 1935
    assert accelerator("a100-sxm-80gb").bandwidth_gb_s == 2039
    assert accelerator("h100-sxm-80gb").bandwidth_gb_s == 3350
    assert accelerator("h200-sxm-141gb").bandwidth_gb_s == 4800
    assert accelerator("a100-sxm-80gb").tflops["bf16"] == 312
    assert accelerator("h100-sxm-80gb").tflops["fp8"] == pytest.approx(1979, rel=1e-3)


def test_a_type_without_tensor_cores_is_multiplied_in_bf16():
    a100 = accelerator("a100")
    assert not a100.supports("fp8")
    assert a100.flops("fp8") == a100.flops("bf16")


def test_an_accelerator_can_be_a_dictionary_key():
    assert {accelerator("h100"): 1}[accelerator("h100-sxm-80gb")] == 1

"""What of PEFT's test-suite is left out, by name, and why.

Patterns are shell patterns over `file::Class::test[parameters]`; `[[]` stands for an opening bracket. Every entry must match
a test of the suite, so that the list cannot outlive its reasons.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Tests that are left out of the runs of some adapter modes."""

    pattern: str
    reason: str
    modes: tuple[str, ...] = ("lora", "full")


HUB = "Downloads a model or a data set from the Hub, and the suite runs offline."
_HUB = (
    "test_custom_models.py::TestPeftCustomModel::test_delete_adapter_multiple_adapters_with_trainable_token_indices",
    "test_custom_models.py::TestPeftCustomModel::test_multiple_adapters_automatic_modules_to_save",
    "test_custom_models.py::TestPeftCustomModel::test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
    "test_custom_models.py::TestPeftCustomModel::test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_custom_models.py::TestPeftCustomModel::test_gpt2_dora_merge_and_unload",
    "test_custom_models.py::TestPeftCustomModel::test_gpt2_dora_merge_and_unload_safe_merge",
    "test_custom_models.py::TestPeftCustomModel::test_dora_save_and_load_remapping",
    "test_custom_models.py::TestPeftCustomModel::test_pvera_reproducible",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_lora_opt_timing*",
    "test_custom_models.py::TestDynamicDispatch::test_override_lora_linear",
    "test_low_level_api.py::TestInjectAdapterFromStateDict::*",
    "test_low_level_api.py::TestPeftStateDict::test_get_peft_model_state_dict_removes_*",
    "test_low_level_api.py::TestGetBaseModelStateDict::*",
    "test_tuners_utils.py::TestPeftCustomKwargs::test_module_matching_lora",
    "test_tuners_utils.py::TestPeftCustomKwargs::test_feedforward_matching_ia3",
    "test_tuners_utils.py::TestPeftCustomKwargs::test_maybe_include_all_linear_*",
    "test_tuners_utils.py::TestPeftCustomKwargs::test_all_linear_nested_targets_correct_layers*",
    "test_tuners_utils.py::TestPeftCustomKwargs::test_add_second_adapter_with_all_linear_works",
    "test_tuners_utils.py::*::test_realistic_example",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_base_model_type_transformers_automodel",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_transformers_model",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_transformer_model_without_adapter_raises",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_prefix_tuning",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_adaption_prompt",
    "test_tuners_utils.py::TestBaseTunerWarnForTiedEmbeddings::*",
    "test_tuners_utils.py::TestFindMinimalTargetModules::test_get_peft_model_applies_find_target_modules",
    "test_config.py::TestPeftConfig::test_from_pretrained[[]*",
    "test_config.py::TestPeftConfig::test_from_pretrained_cache_dir*",
    "test_config.py::TestPeftConfig::test_save_pretrained_with_runtime_config*",
    "test_vision_models.py::TestPastKV::test_past_kv",
)

NOT_APPLICABLE: tuple[Entry, ...] = (*(Entry(pattern, HUB) for pattern in _HUB),)

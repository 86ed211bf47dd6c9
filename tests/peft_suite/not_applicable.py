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
    modes: tuple[str, ...]


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

LOW_RANK = "Reads or counts LoRA's low-rank matrices, ranks or scalings, and full adapters have none."
_LOW_RANK = (
    "test_custom_models.py::TestPeftCustomModel::test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias*",
    "test_custom_models.py::TestPeftCustomModel::test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises*",
    "test_custom_models.py::TestPeftCustomModel::test_mha_gradients_set_correctly*",
    "test_custom_models.py::TestPeftCustomModel::test_monteclora_variational_loss_computation*",
    "test_custom_models.py::TestMultiRankAdapter::*",
    "test_custom_models.py::TestLayerRepr::*",
    "test_custom_models.py::TestRequiresGrad::test_loading_adapter_preserves_custom_requires_grad",
    "test_custom_models.py::TestRequiresGrad::test_requires_grad_follows_inference_mode_*",
    "test_custom_models.py::TestRequiresGrad::test_requires_grad_lora_*",
    "test_custom_models.py::TestRequiresGrad::test_requires_grad_modules_to_save_*",
    "test_low_level_api.py::TestLowLevelFunctional::test_inject_adapter_in_model",
    "test_low_level_api.py::TestLowLevelFunctional::test_modules_to_save",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_module_type_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_nb_params_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_requires_grad_irregular",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_requires_grad_model_irregular",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_with_injected_layers",
    "test_tuners_utils.py::TestRankAndAlphaPattern::*",
    "test_tuners_utils.py::TestTunerStateDictKeyPrefixes::test_prefixes_lora",
    "test_tuners_utils.py::TestTunerStateDictKeyPrefixes::test_prefixes_model_with_injected_layers_only",
    "test_tuners_utils.py::TestTunerStateDictKeyPrefixes::test_prefixes_multiple_adapters_and_adapter_name_narrowing",
    "test_tuners_utils.py::TestTunerStateDictKeyPrefixes::test_prefixes_select_correct_state_dict_keys",
)

DORA = "Tests DoRA, a variant of LoRA's matrices, which full adapters refuse with an error."
_DORA = (
    "test_custom_models.py::TestMultipleActiveAdapters::test_multiple_active_dora_adapters_*",
    "test_custom_models.py::TestMultipleActiveAdapters::test_plain_lora_and_dora_adapters_merge_matches_forward*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_lora_with_dora_*",
)

WEIGHTED = "Ends in add_weighted_adapter, which combines low-rank matrices and refuses full adapters with an error."
_WEIGHTED = (
    "test_custom_models.py::TestPeftCustomModel::test_add_weighted_adapter_*",
    "test_custom_models.py::TestPeftCustomModel::test_multiple_adapters_mixed_modules_to_save_merging_adapters",
    "test_custom_models.py::TestPeftCustomModel::test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
    "test_custom_models.py::TestMultipleActiveAdapters::test_multiple_active_adapters_forward[[]LoRA Same*",
    "test_custom_models.py::TestMultipleActiveAdapters::test_multiple_active_adapters_forward[[]LoRA Different*",
    "test_custom_models.py::TestMultipleActiveAdapters::test_multiple_active_adapters_forward[[]Plasticity*",
)

MIXED_BATCH = (
    "Passes one adapter per sample, which full adapters refuse with an error: their weights are no sum over samples."
)
_MIXED_BATCH = (
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_different_target_layers*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_length_mismatch_raises*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_lora_conv1d_emb*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_lora_conv2d*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_lora_wrong_adapter_name_raises*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_merged_raises*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_mha_raises*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_mlp*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_multiple_modules_to_save*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_partly_overlapping_target_layers*",
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_unsupported_layer_raises*",
)

PARAMETERS = "Uses target_parameters, low-rank changes of single parameters, which full adapters refuse with an error."
_PARAMETERS = (
    "test_tuners_utils.py::TestTargetedParameterNames::test_one_targeted_parameters_list",
    "test_tuners_utils.py::TestTargetedParameterNames::test_two_targeted_parameters_list",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_target_parameters*",
)

DISPATCH = "Registers a LoRA layer class for a module type of its own; full adapters wrap any module in the same class."
_DISPATCH = ("test_custom_models.py::TestDynamicDispatch::*",)

NESTED = "Saves and loads the settings of LoRA variants, which full adapters refuse with an error."
_NESTED = ("test_config.py::TestLoraNestedConfigRoundTrip::*",)

TYPE_NAME = "Expects the method to be called LORA or its model LoraModel, and it is called PLASTICITY."
_TYPE_NAME = (
    "test_tuners_utils.py::TestModelAndLayerStatus::test_adapter_model_type_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_peft_types_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_status_with_*",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_model_target_parameters*",
)

MIXED_MODEL = "Builds a PeftMixedModel, which accepts the methods that PEFT lists and names the others in its error."
_MIXED_MODEL = (
    "test_custom_models.py::TestPeftCustomModel::test_add_adapter_rejects_duplicate_name_without_mutation[[]True[]]",
    "test_tuners_utils.py::TestModelAndLayerStatus::test_mixed_model_raises",
)

DEFAULTS = "Expects default modules by model type; without target_modules, plasticity measures the model instead."
_DEFAULTS = (
    "test_custom_models.py::TestDefaultTargetModules::test_default_target_modules_list_of_str*",
    "test_custom_models.py::TestDefaultTargetModules::test_default_target_modules_str*",
)

SHARDED = "Tests a check of sharded state dicts that PEFT makes for PeftType.LORA and PeftType.ADALORA only."
_SHARDED = (
    "test_low_level_api.py::TestStateDictFsdpShapeValidation::test_save_pretrained_warns_for_unsharded_state_dict",
)

UNCOUNTED = "Trains all biases with bias='all', which no budget covers: a config with both is an error that names them."
_UNCOUNTED = (
    "test_custom_models.py::TestPeftCustomModel::test_adding_multiple_adapters_with_bias_raises[[]MLP by report and budget*",
)


def _entries(patterns: tuple[str, ...], reason: str, *modes: str) -> tuple[Entry, ...]:
    return tuple(Entry(pattern, reason, modes) for pattern in patterns)


NOT_APPLICABLE: tuple[Entry, ...] = (
    *_entries(_HUB, HUB, "lora", "full"),
    *_entries(_TYPE_NAME, TYPE_NAME, "lora", "full"),
    *_entries(_MIXED_MODEL, MIXED_MODEL, "lora", "full"),
    *_entries(_DEFAULTS, DEFAULTS, "lora", "full"),
    *_entries(_SHARDED, SHARDED, "lora", "full"),
    *_entries(_UNCOUNTED, UNCOUNTED, "lora"),
    *_entries(_LOW_RANK, LOW_RANK, "full"),
    *_entries(_DORA, DORA, "full"),
    *_entries(_WEIGHTED, WEIGHTED, "full"),
    *_entries(_MIXED_BATCH, MIXED_BATCH, "full"),
    *_entries(_PARAMETERS, PARAMETERS, "full"),
    *_entries(_NESTED, NESTED, "full"),
    *_entries(_DISPATCH, DISPATCH, "full"),
)

"""The names of the settings, frozen: a change here is a change in every recipe."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest

FIELDS = {
    "inlay.core.config:AdapterConfig": """
        auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision
        task_type
    """,
    "inlay.data.settings:DataConfig": """
        chat_template chat_template_kwargs eval_fraction eval_path format limit max_length name
        overlong path revision split train_on
    """,
    "inlay.methods.bottleneck:BottleneckConfig": """
        auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern
        layers_to_transform modules_to_save non_linearity peft_type peft_version reduction_factor
        revision scaling style target_modules task_type
    """,
    "inlay.methods.lora:LoraConfig": """
        alora_invocation_tokens alpha_pattern auto_mapping base_model_name_or_path bias corda_config
        ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
        init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform
        loftq_config lora_alpha lora_bias lora_dropout lora_ga_config modules_to_save peft_type
        peft_version qalora_group_size r rank_pattern revision target_modules target_parameters
        task_type trainable_token_indices use_bdlora use_dora use_qalora use_rslora
    """,
    "inlay.methods._starts:KasaConfig": "beta gamma",
    "inlay.methods._starts:BdLoraConfig": """
        match_strict nblocks target_modules_bd_a target_modules_bd_b
    """,
    "inlay.methods._starts:EvaConfig": """
        adjust_scaling_factors label_mask_value rho tau use_label_mask whiten
    """,
    "inlay.methods._starts:CordaConfig": """
        cache_file corda_method covariance_file prune_temporary_fields use_float16_for_covariance
        verbose
    """,
    "inlay.methods._starts:LoraGAConfig": "direction scale stable_gamma",
    "inlay.methods._starts:LoftQConfig": "loftq_bits loftq_iter",
    "inlay.methods.miss:MissConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules inference_mode init_weights
        layers_pattern layers_to_transform mini_r miss_dropout modules_to_save peft_type
        peft_version r revision target_modules task_type
    """,
    "inlay.methods.hira:HiraConfig": """
        auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out hira_dropout
        inference_mode init_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version r rank_pattern revision target_modules task_type
    """,
    "inlay.methods.road:RoadConfig": """
        auto_mapping base_model_name_or_path exclude_modules group_size inference_mode init_weights
        layers_pattern layers_to_transform modules_to_save peft_type peft_version revision
        target_modules task_type variant
    """,
    "inlay.methods.prompt_tuning:PromptTuningConfig": """
        auto_mapping base_model_name_or_path inference_mode modules_to_save num_attention_heads
        num_layers num_transformer_submodules num_virtual_tokens peft_type peft_version
        prompt_tuning_init prompt_tuning_init_text revision task_type token_dim tokenizer_kwargs
        tokenizer_name_or_path
    """,
    "inlay.methods.prefix_tuning:PrefixTuningConfig": """
        auto_mapping base_model_name_or_path encoder_hidden_size inference_mode init_weights
        modules_to_save num_attention_heads num_layers num_transformer_submodules
        num_virtual_tokens peft_type peft_version prefix_projection revision task_type token_dim
    """,
    "inlay.methods.p_tuning:PromptEncoderConfig": """
        auto_mapping base_model_name_or_path encoder_dropout encoder_hidden_size
        encoder_num_layers encoder_reparameterization_type inference_mode modules_to_save
        num_attention_heads num_layers num_transformer_submodules num_virtual_tokens peft_type
        peft_version revision task_type token_dim
    """,
    "inlay.methods.multitask_prompt_tuning:MultitaskPromptTuningConfig": """
        auto_mapping base_model_name_or_path inference_mode modules_to_save num_attention_heads
        num_layers num_ranks num_tasks num_transformer_submodules num_virtual_tokens peft_type
        peft_version prompt_tuning_init prompt_tuning_init_state_dict_path prompt_tuning_init_task
        prompt_tuning_init_text revision task_type token_dim tokenizer_kwargs tokenizer_name_or_path
    """,
    "inlay.methods.cpt:CPTConfig": """
        auto_mapping base_model_name_or_path cpt_mask cpt_token_ids cpt_tokens_type_mask
        inference_mode modules_to_save num_attention_heads num_layers num_transformer_submodules
        num_virtual_tokens opt_loss_decay_factor opt_projection_epsilon
        opt_projection_format_epsilon opt_weighted_loss_type peft_type peft_version revision
        task_type token_dim tokenizer_name_or_path
    """,
    "inlay.methods.cartridge:CartridgeConfig": """
        auto_mapping base_model_name_or_path inference_mode modules_to_save num_attention_heads
        num_frozen_tokens num_layers num_transformer_submodules num_virtual_tokens peft_type
        peft_version revision task_type token_dim
    """,
    "inlay.methods.delora:DeloraConfig": """
        auto_mapping base_model_name_or_path bias delora_lambda exclude_modules inference_mode
        init_weights lambda_pattern layers_pattern layers_to_transform module_dropout
        modules_to_save peft_type peft_version r rank_pattern revision target_modules task_type
    """,
    "inlay.methods.gralora:GraloraConfig": """
        alpha auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out
        gralora_dropout gralora_k hybrid_r inference_mode init_weights layers_pattern
        layers_to_transform modules_to_save peft_type peft_version r revision target_modules
        task_type
    """,
    "inlay.methods.shira:ShiraConfig": """
        auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode
        init_weights layers_pattern layers_to_transform mask_type modules_to_save peft_type
        peft_version r random_seed revision target_modules task_type
    """,
    "inlay.methods.supertuning:SupertuningConfig": """
        auto_mapping base_model_name_or_path inference_mode init_weights exclude_modules
        layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type
        peft_version r revision save_precomputed_indices select_top sparsity target_modules
        task_type
    """,
    "inlay.methods.osf:OSFConfig": """
        auto_mapping base_model_name_or_path effective_rank exclude_modules inference_mode
        init_weights layers_pattern layers_to_transform modules_to_save peft_type peft_version
        rank_pattern revision target_modules target_svd_config task_type
    """,
    "inlay.methods.adalora:AdaLoraConfig": """
        auto_mapping base_model_name_or_path beta1 beta2 bias deltaT exclude_modules fan_in_fan_out
        inference_mode init_lora_weights init_r layers_pattern layers_to_transform lora_alpha
        lora_dropout modules_to_save orth_reg_weight peft_type peft_version r rank_pattern revision
        target_modules target_r task_type tfinal tinit total_step
    """,
    "inlay.methods.peanut:PeanutConfig": """
        act_fn auto_mapping base_model_name_or_path depth exclude_modules inference_mode
        init_weights layers_pattern layers_to_transform modules_to_save peft_type peft_version r
        revision scaling target_modules task_type
    """,
    "inlay.methods.glora:GloraConfig": """
        auto_mapping base_model_name_or_path config_A_B config_C config_D_E exclude_modules
        inference_mode init_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version r revision target_modules task_type
    """,
    "inlay.methods.psoft:PsoftConfig": """
        ab_svd_init auto_mapping base_model_name_or_path cayley_neumann_eps exclude_modules
        fan_in_fan_out inference_mode init_weights layers_pattern layers_to_transform
        modules_to_save num_cayley_neumann_terms peft_type peft_version psoft_alpha psoft_dropout
        psoft_mag_a psoft_mag_b psoft_orth psoft_svd psoft_svd_lowrank_niter r random_seed revision
        target_modules task_type use_cayley_neumann
    """,
    "inlay.methods.ia3:IA3Config": """
        auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out feedforward_modules
        inference_mode init_ia3_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version revision target_modules task_type
    """,
    "inlay.methods.ln_tuning:LNTuningConfig": """
        auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern
        layers_to_transform modules_to_save peft_type peft_version revision target_modules task_type
    """,
    "inlay.methods.bitfit:BitfitConfig": """
        auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern
        layers_to_transform modules_to_save peft_type peft_version revision target_modules task_type
    """,
    "inlay.methods.deft:DeftConfig": """
        alpha auto_mapping base_model_name_or_path bias decomposition_method deft_dropout
        exclude_modules fan_in_fan_out inference_mode init_scale init_weights layers_pattern
        layers_to_transform modules_to_save para peft_type peft_version r revision target_modules
        task_type
    """,
    "inlay.methods.unilora:UniLoraConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode
        init_theta_d_bound init_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version proj_seed r revision save_indices target_modules task_type theta_d_length
        unilora_dropout
    """,
    "inlay.methods.tinylora:TinyLoraConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode
        init_v_bound init_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version projection_seed r revision save_projection target_modules task_type
        tinylora_dropout u weight_tying
    """,
    "inlay.methods.vblora:VBLoRAConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode
        init_logits_std init_vector_bank_bound layers_pattern layers_to_transform modules_to_save
        num_vectors peft_type peft_version r revision save_only_topk_weights target_modules
        task_type topk vblora_dropout vector_length
    """,
    "inlay.methods.adamss:AdamssConfig": """
        asa_importance_beta asa_schedule_exponent asa_target_subspaces asa_uncertainty_beta
        auto_mapping base_model_name_or_path exclude_modules final_warmup inference_mode init_warmup
        init_weights layers_pattern layers_to_transform mask_interval modules_to_save num_subspaces
        peft_type peft_version r random_seed revision subspace_rank svd_threshold target_modules
        task_type use_dynamic_rank
    """,
    "inlay.methods.frod:FrodConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out frod_dropout
        inference_mode init_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version progressbar projection_prng_key regularization_alpha revision save_projection
        sparse_rate target_modules task_type
    """,
    "inlay.methods.vera:VeraConfig": """
        auto_mapping base_model_name_or_path bias d_initial exclude_modules fan_in_fan_out
        inference_mode init_weights layers_pattern layers_to_transform modules_to_save
        peft_type peft_version projection_prng_key r revision save_projection target_modules
        task_type vera_dropout
    """,
    "inlay.methods.randlora:RandLoraConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out
        inference_mode init_weights layers_pattern layers_to_transform modules_to_save
        peft_type peft_version projection_prng_key r randlora_alpha randlora_dropout
        revision save_projection sparse target_modules task_type very_sparse
    """,
    "inlay.methods.trainable_tokens:TrainableTokensConfig": """
        auto_mapping base_model_name_or_path exclude_modules inference_mode init_weights
        layers_pattern layers_to_transform modules_to_save peft_type peft_version revision
        target_modules task_type token_indices
    """,
    "inlay.methods.beft:BeftConfig": """
        auto_mapping base_model_name_or_path exclude_modules inference_mode init_weights
        layers_pattern layers_to_transform modules_to_save peft_type peft_version revision
        target_modules task_type
    """,
    "inlay.methods.pvera:PveraConfig": """
        auto_mapping base_model_name_or_path bias d_initial exclude_modules fan_in_fan_out
        inference_mode init_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version projection_prng_key pvera_dropout r revision save_projection target_modules
        task_type
    """,
    "inlay.methods.hra:HRAConfig": """
        apply_GS auto_mapping base_model_name_or_path bias exclude_modules inference_mode
        init_weights layers_pattern layers_to_transform modules_to_save peft_type peft_version r
        revision target_modules task_type
    """,
    "inlay.methods.oft:OFTConfig": """
        auto_mapping base_model_name_or_path bias block_share coft eps exclude_modules
        fan_in_fan_out inference_mode init_weights layers_pattern layers_to_transform
        module_dropout modules_to_save num_cayley_neumann_terms oft_block_size peft_type
        peft_version r revision target_modules task_type use_cayley_neumann
    """,
    "inlay.methods.boft:BOFTConfig": """
        auto_mapping base_model_name_or_path bias boft_block_num boft_block_size boft_dropout
        boft_n_butterfly_factor exclude_modules fan_in_fan_out inference_mode init_weights
        layers_pattern layers_to_transform modules_to_save peft_type peft_version revision
        target_modules task_type
    """,
    "inlay.methods.fourierft:FourierFTConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode
        init_weights layers_pattern layers_to_transform modules_to_save n_frequency
        n_frequency_pattern peft_type peft_version random_loc_seed revision scaling target_modules
        task_type
    """,
    "inlay.methods.waveft:WaveFTConfig": """
        auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode
        init_weights layers_pattern layers_to_transform modules_to_save n_frequency
        n_frequency_pattern peft_type peft_version proportional_parameters random_loc_seed revision
        scaling target_modules task_type use_idwt wavelet_family
    """,
    "inlay.methods.c3a:C3AConfig": """
        auto_mapping base_model_name_or_path bias block_size block_size_pattern exclude_modules
        inference_mode init_weights layers_pattern layers_to_transform modules_to_save peft_type
        peft_version revision target_modules task_type
    """,
    "inlay.methods.loha:LoHaConfig": """
        alpha alpha_pattern auto_mapping base_model_name_or_path exclude_modules inference_mode
        init_weights layers_pattern layers_to_transform module_dropout modules_to_save peft_type
        peft_version r rank_dropout rank_pattern revision target_modules task_type
        use_effective_conv2d
    """,
    "inlay.methods.lokr:LoKrConfig": """
        alpha alpha_pattern auto_mapping base_model_name_or_path decompose_both decompose_factor
        exclude_modules inference_mode init_weights layers_pattern layers_to_transform
        module_dropout modules_to_save peft_type peft_version r rank_dropout rank_dropout_scale
        rank_pattern revision target_modules task_type use_effective_conv2d
    """,
    "inlay.methods.adaption_prompt:AdaptionPromptConfig": """
        adapter_layers adapter_len auto_mapping base_model_name_or_path inference_mode
        modules_to_save peft_type peft_version revision target_modules task_type
    """,
    "inlay.methods.poly:PolyConfig": """
        auto_mapping base_model_name_or_path exclude_modules inference_mode init_weights
        layers_pattern layers_to_transform modules_to_save n_skills n_splits n_tasks peft_type
        peft_version poly_type r revision target_modules task_type
    """,
    "inlay.methods.xlora:XLoraConfig": """
        adapters auto_mapping base_model_name_or_path enable_softmax enable_softmax_topk
        global_scaling_weight hidden_size inference_mode layerwise_scalings modules_to_save
        peft_type peft_version revision scaling_pass_value softmax_temperature task_type
        top_k_lora use_trainable_adapters xlora_depth xlora_dropout_p xlora_size
    """,
    "inlay.methods.lily:LilyConfig": """
        auto_mapping base_model_name_or_path exclude_modules inference_mode init_weights
        layers_pattern layers_to_transform modules_to_save num_B peft_type peft_version r revision
        scaling stride_A target_modules task_type
    """,
    "inlay.train.settings:TrainConfig": """
        adam_beta1 adam_beta2 adam_epsilon compile early_stopping_patience
        early_stopping_threshold eval_batch_size eval_steps fast gradient_accumulation_steps
        gradient_checkpointing learning_rate logging_steps loraplus_lr_embedding
        loraplus_lr_ratio lr_scheduler max_grad_norm max_steps micro_batch_size num_epochs
        offload_activations optimizer packing precision restore_best save_steps save_total_limit
        seed warmup_ratio warmup_steps weight_decay
    """,
}


@pytest.mark.parametrize("place", FIELDS)
def test_the_settings_have_these_names(place: str) -> None:
    config = imported(place)
    refused = getattr(config, "not_yet", {})  # PEFT's fields that are only read and written
    names = {field.name for field in dataclasses.fields(config)} - set(refused)
    assert names == set(FIELDS[place].split())


@pytest.mark.parametrize("place", FIELDS)
def test_every_setting_has_a_default_so_that_a_recipe_may_leave_it_out(place: str) -> None:
    for field in dataclasses.fields(imported(place)):
        given = (field.default, field.default_factory)
        assert given != (dataclasses.MISSING, dataclasses.MISSING), field.name


def imported(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)

"""Keys that LLaMA-Factory 0.9, DataFlex 1.1 or transformers' TrainingArguments know and dataflex does not use.

A file that has them still loads, with one warning that lists them; any other unknown key is an error.
"""

_NAMES = """
    accelerator_config activation_checkpointing_kwargs adapter_folder apollo_layerwise apollo_proj
    apollo_proj_type apollo_rank apollo_scale apollo_scale_front apollo_scale_type apollo_target
    apollo_update_interval asft_alpha audio_sampling_rate badam_mask_mode badam_mode badam_start_block
    badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose batch_eval_metrics batch_size
    block_diag_attn buffer_size compute_accuracy compute_dtype crop_to_patches data_seed data_shared_file_system
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context ddp_backend debug device_map
    disable_tqdm do_eval do_predict do_sample download_mode dpo_label_smoothing eaft_alpha enable_jit_checkpoint
    enable_liger_kernel enable_torch_profiler eval_do_concat_batches eval_num_beams eval_on_each_dataset
    eval_use_gather_object export_quantization_dataset export_quantization_maxlen export_quantization_nsamples
    fp16_backend fp16_opt_level fp8 fp8_backend fp8_enable_fsdp_float8_all_gather freeze_extra_modules
    freeze_language_model freeze_multi_modal_projector freeze_trainable_layers freeze_trainable_modules
    freeze_vision_tower fsdp_config galore_layerwise galore_proj_type galore_rank galore_scale galore_target
    galore_update_interval generation_max_length generation_num_beams gradient_checkpointing_kwargs
    half_precision_backend hf_hub_token hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token hyper_parallel_args ignore_data_skip ignore_pad_token_for_loss image_do_pan_and_scan
    image_max_pixels image_min_pixels image_resolution include_effective_tokens_per_second include_for_metrics
    include_tokens_per_second infer_backend infer_dtype init_mixture_proportions init_special_tokens
    interleave_probs jit_mode_eval kt_expert_checkpoint_path kt_lora_expert_intermediate_size kt_lora_expert_num
    kt_use_lora_experts kt_weight_path kto_chosen_weight kto_rejected_weight label_names lang ld_alpha
    length_column_name length_penalty liger_kernel_config local_rank loraplus_lr_embedding low_cpu_mem_usage
    master_addr master_port max_length media_dir mixture_sample_rule model_max_length
    module_dropout ms_hub_token n_shot num_beams offload_folder oft_block_size oft_rank oft_target om_hub_token
    optim_args optim_target_modules parallelism_config past_index pissa_convert pissa_iter placement_strategy
    ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards predict_with_generate
    pref_bco_weight pref_beta pref_ftx pref_loss preprocessing_batch_size print_param_status profile_modules
    profiler_active_steps profiler_output_dir profiler_profile_memory profiler_record_shapes profiler_repeat
    profiler_wait_steps profiler_warmup_steps profiler_with_stack quantization_device_map ray_init_kwargs
    ray_num_workers ray_run_name ray_scope ray_storage_path ref_model ref_model_adapters
    ref_model_quantization_bit remove_unused_columns repetition_penalty resources_per_worker
    restore_callback_states_from_checkpoint reward_model reward_model_adapters reward_model_quantization_bit
    reward_model_type save_dir save_on_each_node save_safetensors sglang_config sglang_lora_backend
    sglang_maxlen sglang_mem_fraction sglang_tp_size simpo_gamma skip_special_tokens swanlab_api_key
    swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name
    swanlab_workspace task task_dir temperature top_k top_p torch_compile torch_compile_backend
    torch_compile_mode torchdynamo tpu_num_cores upcast_lmhead_output use_audio_in_video use_cache
    use_fast_tokenizer use_hyper_parallel use_ipex use_kt use_kv_cache use_liger_kernel use_mca use_mps_device
    use_reentrant_gc use_swanlab use_unsloth use_unsloth_gc use_v1_kernels video_fps video_max_pixels
    video_maxlen video_min_pixels vllm_config vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank vllm_maxlen
"""
PEER_KEYS = frozenset(_NAMES.split())

_PAIRS = "gradients and moments are those of plain LoRA pairs (a trainer that has it can train on what `select` writes)"

# Keys that would change the result if they were ignored, and why they are not taken.
REFUSED_KEYS = {
    "use_dora": _PAIRS,
    "additional_target": _PAIRS,
    "pissa_init": _PAIRS,
    "use_llama_pro": _PAIRS,
    "mixture_of_depths": "the model's layers are used as they are",
    "shift_attn": "the model's attention is used as it is",
    "rope_scaling": "the model's positions are used as they are",
    "packing": "a row is scored and trained on by itself, so rows must stay rows",
    "neat_packing": "a row is scored and trained on by itself, so rows must stay rows",
    "streaming": "rows are scored by number",
    "tokenized_path": "rows are tokenized from their source",
    "use_galore": "it is another optimizer than the AdamW whose steps are scored",
    "use_apollo": "it is another optimizer than the AdamW whose steps are scored",
    "use_badam": "it is another optimizer than the AdamW whose steps are scored",
    "use_muon": "it is another optimizer than the AdamW whose steps are scored",
    "use_adam_mini": "it is another optimizer than the AdamW whose steps are scored",
    "loraplus_lr_ratio": "every LoRA matrix has the one learning rate",
    "train_from_scratch": "LoRA adapts a trained model",
    "resize_vocab": "the vocabulary stays the base model's",
    "add_tokens": "the vocabulary stays the base model's",
    "add_special_tokens": "the vocabulary stays the base model's",
    "split_special_tokens": "special tokens are single tokens in every template",
    "new_special_tokens_config": "the vocabulary stays the base model's",
    "default_system": "the template's system text is used",
    "tool_format": "the template's tool format is used",
    "fsdp": "runs are single-process, DDP or DeepSpeed",
    "use_cpu": "the device is found by itself (an empty CUDA_VISIBLE_DEVICES hides the GPUs)",
    "no_cuda": "the device is found by itself (an empty CUDA_VISIBLE_DEVICES hides the GPUs)",
    "auto_find_batch_size": "the schedule counts rows a step",
    "group_by_length": "the order of rows comes from seed",
    "train_sampling_strategy": "the order of rows comes from seed",
    "disable_shuffling": "the order of rows comes from seed",
    "early_stopping_steps": "the schedule fixes the number of steps",
    "moe_aux_loss_coef": "scores use plain cross-entropy",
    "label_smoothing_factor": "scores use plain cross-entropy",
    "use_dft_loss": "scores use plain cross-entropy",
    "use_asft_loss": "scores use plain cross-entropy",
    "use_eaft_loss": "scores use plain cross-entropy",
    "push_to_hub": "nothing is uploaded",
    "export_quantization_bit": "merge writes plain weights",
    "export_hub_model_id": "nothing is uploaded",
    "load_best_model_at_end": "the last adapter is the result",
}

# Values of those keys that ask for nothing, besides the empty ones.
NEUTRAL = {"train_sampling_strategy": "random"}

# Former names of keys.
RENAMED_KEYS = {"evaluation_strategy": "eval_strategy", "activation_checkpointing": "gradient_checkpointing"}

# Parameters of DataFlex's selectors that have no meaning here.
PEER_PARAMS = frozenset({"save_interval"})

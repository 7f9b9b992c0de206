"""A model of a few kilobytes over a few dozen words, for tests that run a command hundreds of times."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{{ strftime_now('%Y') + ' ' }}{{ ' u ' if enable_thinking is defined else '' }}"
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% if m['role'] == 'assistant' %} end{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def make_model(folder: Path, seed: int) -> Path:
    """A one-layer Llama over 64 words, with a dated chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "user", "assistant", "system", "end", "u", "<think>", "</think>", "2001", "2026", "2027"]
    words += [f"w{i}" for i in range(64 - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder

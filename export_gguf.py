"""Write a checkpoint as one GGUF file, the format of llama.cpp and of what is built on it, with an Ollama Modelfile.

    python export_gguf.py out/sft                       # out/sft/sft-f32.gguf, the exact weights
    python export_gguf.py out/sft --dtype q8_0 --output chat.gguf

A GGUF file is a table of facts (shape, tokenizer, chat template), then the tensors under llama.cpp's names. Three
things make llama.cpp compute the same tokens as we do:
    weights    the experts of a layer lie in one tensor [E, out, in]; norms and routers stay f32 in every file
    tokenizer  llama.cpp cuts text by one of its built-in patterns, chosen by name (PRETOKENIZERS); its own converter
               guesses that name from a list of known models and stops at a vocabulary of one's own
    bos        the chat template writes it, so add_bos_token is false, or every prompt would begin with two

q8_0 keeps every 32 neighbours of a row as 32 signed bytes and one f16 scale, max |w| / 127: 8.5 bits a weight.
What llama.cpp would compute differently from us is refused (check_shape()), never written with a warning.

Format: github.com/ggml-org/ggml, docs/gguf.md. Letters: E experts, H heads, C head_dim, D hidden size.
"""
import importlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch

import checkpoint
import cli
import common
import logs
from bpe import GPT2_PATTERN, PATTERN
from configuration import ModelConfig, need
from model import Transformer
from tokenizer import Tokenizer
from weights import is_reward

ARCHITECTURES = {"qwen3": "qwen3", "qwen3_moe": "qwen3moe", "dots1": "dots1"}  # model_type -> llama.cpp's name
# pattern -> name of the equal one in llama.cpp. Qwen's reads digits one by one, GPT-2's runs of any length.
PRETOKENIZERS = {PATTERN: "llama-bpe", PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2", GPT2_PATTERN: "gpt-2"}
# our name -> llama.cpp's; what stands in a layer is named blk.<layer>.<name>
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
INSIDE = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
          "self_attn.q_proj.weight": "attn_q.weight", "self_attn.q_norm.weight": "attn_q_norm.weight",
          "self_attn.k_proj.weight": "attn_k.weight", "self_attn.k_norm.weight": "attn_k_norm.weight",
          "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
          "mlp.gate.weight": "ffn_gate_inp.weight", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
          **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
          **{f"mlp.experts.{part}_proj.weight": f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")},
          **{f"mlp.shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")}}
ALWAYS_F32 = re.compile(r"_norm\.|ffn_gate_inp|exp_probs_b")  # small, and rounding them costs most
Q8_BLOCK = 32  # a row of a q8_0 tensor is a whole number of blocks


def parse_args(argv=None):
    """The checkpoint, the type of its weights, and where the file goes."""
    parser = cli.Parser(__doc__)
    parser.add_argument("weight", help="checkpoint: name below --save_dir, or a folder with a whole model")
    parser.add_argument("--dtype", default="f32", choices=("f32", "bf16", "q8_0"),
                        help="of the matrices: 32, 16 or 8.5 bits a weight")
    parser.add_argument("--output", default="", help="file to write; left out: <checkpoint>/<its name>-<dtype>.gguf")
    parser.add_argument("--save_dir", default="out", help="folder of all checkpoints")
    cli.switch(parser, "--debug", 0, "show the traceback of an error")
    return parser.parse_args(argv)


def load_gguf():
    """The gguf package, which knows the format. Raises: ValueError with the line that installs it."""
    try:
        return importlib.import_module("gguf")
    except ImportError as missing:
        raise ValueError(f"the gguf package cannot be imported ({missing}); it writes the format and is needed for "
                         "nothing else here; install it: pip install gguf") from None


# ----------------------------------------------------------------------------------------------------------------------
# The facts
def check_shape(config: ModelConfig):
    """ValueError for a model that llama.cpp would load and compute differently, or not at all."""
    kind, elsewhere = config.model_type, "open the folder with transformers instead, which runs it as it is"
    need(kind in ARCHITECTURES, f"mlp_type={config.mlp_type!r}", "no other program knows this MLP", "train with gated")
    need(config.hidden_act == "silu", f"hidden_act={config.hidden_act!r}", "llama.cpp runs this architecture with silu "
         "whatever the file says", elsewhere)
    if kind == "qwen3_moe":
        need(config.norm_topk_prob, "norm_topk_prob=False", "llama.cpp's qwen3moe always makes the weights of the "
             "chosen experts sum to 1", elsewhere)
        need(config.first_k_dense_replace == 0, f"first_k_dense_replace={config.first_k_dense_replace}",
             "llama.cpp's qwen3moe has experts in every layer", elsewhere)
    yarn = config.rope_scaling or {}
    usual = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1}
    odd = [key for key in yarn if key not in ("factor", "original_max_position_embeddings")
           and yarn[key] != usual.get(key)]
    need(not odd, f"rope_scaling with {', '.join(odd)}", "a GGUF file holds YaRN's factor and original context only",
         elsewhere)


def write_shape(writer, config: ModelConfig, gguf):
    """The numbers that llama.cpp builds the model from."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads(config))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling["original_max_position_embeddings"])
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.n_shared_experts:
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)


def write_tokenizer(writer, tokenizer: Tokenizer, rows: int, gguf):
    """Tokens, merges and control ids. rows: of the embedding; ids without a token are named and marked unused."""
    need(tokenizer.pattern in PRETOKENIZERS, f"split pattern {tokenizer.pattern!r}", "llama.cpp cuts text by patterns "
         f"of its own, of which {', '.join(PRETOKENIZERS.values())} are known here", "use a tokenizer of MiniLLM, "
         "MiniMind or Qwen, or convert the folder with llama.cpp's convert_hf_to_gguf.py")
    need(tokenizer.max_id < rows, f"token id {tokenizer.max_id} with vocab_size {rows}", "every id has a row of the "
         "embedding", "use the tokenizer saved with the model")
    spec = json.loads(tokenizer.files["tokenizer.json"])
    tokens = [f"[unused {i}]" for i in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for text, i in spec["model"]["vocab"].items():
        tokens[i], types[i] = text, gguf.TokenType.NORMAL
    for token in spec.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    writer.add_tokenizer_model("gpt2")  # the word for byte-level BPE
    writer.add_tokenizer_pre(PRETOKENIZERS[tokenizer.pattern])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    for add, value in ((writer.add_bos_token_id, tokenizer.bos_id), (writer.add_eos_token_id, tokenizer.eos_id),
                       (writer.add_pad_token_id, tokenizer.pad_id)):
        if value is not None:
            add(value)
    writer.add_add_bos_token(False)  # llama-bpe alone would mean true


def chat_template(tokenizer: Tokenizer) -> str:
    """The folder's Jinja template without the tags that mark what is trained, which only transformers knows; "" for a
    folder without one."""
    config = json.loads(tokenizer.files.get("tokenizer_config.json", "{}"))
    text = tokenizer.files.get("chat_template.jinja") or config.get("chat_template")
    if not isinstance(text, str):
        return ""
    # not simply cut out: "if true" in the tag's place takes away the same white space around it
    return re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})",
                  lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", text)


# ----------------------------------------------------------------------------------------------------------------------
# The tensors
def kv_heads(config: ModelConfig) -> int:
    """KV heads in the file: llama.cpp's dots1 knows no shared ones, so there each query head gets a copy of its own
    (the same function, with a cache as large as without sharing)."""
    return config.num_attention_heads if config.model_type == "dots1" else config.num_key_value_heads


def repeat_heads(weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """k_proj or v_proj [kv heads * C, D] with every head repeated for each query head that reads it [H * C, D]."""
    heads = weight.view(config.num_key_value_heads, config.head_dim, -1)  # [kv heads, C, D]
    return heads.repeat_interleave(kv_heads(config) // len(heads), dim=0).flatten(0, 1)  # [H * C, D]


def tensors(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """(llama.cpp's name, tensor) of everything a file holds, layer by layer."""
    state, config = model.state_dict(), model.config
    for name, tensor in state.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if layer is None:
            # llama.cpp takes the embedding where there is no head, but for dots1
            if name != "lm_head.weight" or not config.tie_word_embeddings or config.model_type == "dots1":
                yield OUTSIDE[name], tensor
            continue
        number, inner = layer.groups()
        expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(.+)", inner)
        if expert is None:
            tensor = repeat_heads(tensor, config) if inner.endswith(("k_proj.weight", "v_proj.weight")) else tensor
            yield f"blk.{number}.{INSIDE[inner]}", tensor
        elif expert[1] == "0":
            stack = [state[f"model.layers.{number}.mlp.experts.{i}.{expert[2]}"] for i in range(config.num_experts)]
            yield f"blk.{number}.{INSIDE[f'mlp.experts.{expert[2]}']}", torch.stack(stack)  # [E, out, in]


def storage(name: str, tensor: torch.Tensor, dtype: str) -> str:
    """How a tensor is kept in a file of this --dtype: f32, bf16 or q8_0."""
    if dtype == "f32" or ALWAYS_F32.search(name):
        return "f32"
    return "bf16" if dtype == "q8_0" and tensor.shape[-1] % Q8_BLOCK else dtype


# ----------------------------------------------------------------------------------------------------------------------
# The files
def write_gguf(path: Path, model: Transformer, tokenizer: Tokenizer, name: str, template: str, dtype: str, gguf):
    """Write the whole file beside its place, then rename it. Returns {storage type: number of tensors}."""
    tmp = path.with_name(path.name + ".tmp")
    file_types = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    counts = {}
    try:
        writer = gguf.GGUFWriter(tmp, ARCHITECTURES[model.config.model_type])
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[file_types[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_shape(writer, model.config, gguf)
        write_tokenizer(writer, tokenizer, model.config.vocab_size, gguf)
        if template:
            writer.add_chat_template(template)
        named = list(tensors(model))
        with logs.progress(len(named), "tensors", unit="tensor") as bar:
            for tensor_name, tensor in named:
                kind = storage(tensor_name, tensor, dtype)
                counts[kind] = counts.get(kind, 0) + 1
                form = gguf.GGMLQuantizationType[kind.upper()]
                writer.add_tensor(tensor_name, gguf.quants.quantize(tensor.float().numpy(), form), raw_dtype=form)
                bar.update()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(tmp, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    return counts


def opening(tokenizer: Tokenizer) -> str:
    """The text of the bos token that every document begins with, "" where there is none."""
    return "" if tokenizer.bos_id in (None, tokenizer.im_start_id) else tokenizer.decode([tokenizer.bos_id])


def modelfile(gguf_name: str, tokenizer: Tokenizer, config: ModelConfig, chat: bool) -> str:
    """What `ollama create` reads: our layout in Ollama's own template language, and the settings of eval.py."""
    turns = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    template = turns if chat else "{{ .Prompt }}"
    stops = [tokenizer.decode([i]) for i in sorted(tokenizer.stop_ids(chat))]
    # Ollama's own values would be: a context of 4096 whatever the model's, and a penalty on repeated words
    settings = [f"num_ctx {config.max_position_embeddings}", "temperature 0.7", "top_p 0.9", "repeat_penalty 1.0",
                *(f"stop {json.dumps(text, ensure_ascii=False)}" for text in stops)]
    return "\n".join([f"FROM ./{gguf_name}", f'TEMPLATE """{opening(tokenizer)}{template}"""',
                      *(f"PARAMETER {line}" for line in settings), ""])


def main(args):
    """Export. Returns the facts it prints."""
    gguf = load_gguf()
    folder = checkpoint.find(args.save_dir, args.weight)
    if is_reward(folder):
        raise ValueError(f"{folder} is a reward model; the programs that read GGUF write answers, and it can only "
                         "score them; name another checkpoint")
    model, tokenizer = Transformer.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    check_shape(model.config)
    name = folder.resolve().name.removesuffix(".previous")
    output = Path(args.output or folder / f"{name}-{args.dtype}.gguf")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; the model becomes one file; give a name that ends in .gguf")
    output.parent.mkdir(parents=True, exist_ok=True)
    # a pretrained model continues text: with a template every program would hold a conversation with it
    pretrained = checkpoint.read_minillm(folder).get("stage") == "pretrain"
    template = "" if pretrained or tokenizer.im_start_id is None else chat_template(tokenizer)
    counts = write_gguf(output, model, tokenizer, name, template, args.dtype, gguf)
    recipe = output.with_suffix(".Modelfile")
    recipe.write_text(modelfile(output.name, tokenizer, model.config, bool(template)), encoding="utf-8")
    size = output.stat().st_size
    kept = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"{output}: {ARCHITECTURES[model.config.model_type]}, {model.num_parameters() / 1e6:.2f}M parameters, "
          f"{size / 1e6:.1f} MB, tensors: {kept}")
    run = ["llama-cli", "-m", str(output)] if template else [
        "llama-completion", "-m", str(output), "-p", f"{opening(tokenizer)}Once upon a time"]
    create = shlex.join(["ollama", "create", name, "-f", str(recipe)])
    print(f"next: {shlex.join(run)}   or: {create} && {shlex.join(['ollama', 'run', name])}")
    return {"file": str(output), "modelfile": str(recipe), "tensors": counts, "bytes": size}


if __name__ == "__main__":
    common.run(main, parse_args)

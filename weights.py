"""The Hugging Face folder: config.json, generation_config.json and model.safetensors, in and out.

Reading is strict: every tensor of the model is in the files and every tensor of the files in the model, under the same
name and with the same shape, or a ValueError says which one is not and why that may be. Names, shapes and types are
compared before memory is taken. A downloaded folder may be hostile: only safetensors are opened, never a pickle, and
nothing outside the folder. Tensors bear the names that `transformers` writes, so no conversion stands between.

What this file does not do: interpret config.json (configuration.py), know a class of model (load_model() is given what
makes one, by model.py), or look after whole checkpoints, with tokenizer and resume state (checkpoint.py).
"""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises: FileNotFoundError, or ValueError that names file and place."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder holds config.json and model.safetensors; "
                                "give the folder of a finished stage")
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); the file is damaged; restore it") from None
    if not isinstance(out, dict):
        raise ValueError(f"{path} holds a {type(out).__name__}; it is a JSON object; restore the file")
    return out


def is_reward(folder) -> bool:
    """Whether a folder holds a model that scores answers and cannot give any. Raises as read_json()."""
    # the class in config.json, not our own stage: a folder from elsewhere has only that
    names = read_json(Path(folder) / "config.json").get("architectures")
    return isinstance(names, list) and any("SequenceClassification" in str(name) for name in names)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    # bare names of this one format: "../../secret" in a downloaded index must not be opened, nor a pickle
    safe = isinstance(names, dict) and all(isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors")
                                           for n in names.values())
    if not safe or not names:
        raise ValueError(f"weight_map of {index}; it maps tensor names to .safetensors files of the same folder; "
                         "restore it")
    return [folder / name for name in sorted(set(names.values()))]


def read_tensors(folder: Path) -> dict[str, tuple[Path, tuple, str]]:
    """Name -> (file, shape, dtype) of every stored tensor, from the files' headers only."""
    found = {}
    for path in weight_files(folder):
        if not path.is_file() and (folder / "adapter").is_dir():
            raise ValueError(f"{folder} holds adapters without the model they belong to; training starts from whole "
                             f"models; python lora.py merge --adapter {folder}/adapter ...")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; the weights belong beside config.json; copy all files "
                                    "of the model")
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
                here = {name: (path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}); it is damaged or incomplete; copy "
                             "it again or use an earlier checkpoint") from None
        for name in sorted(found.keys() & here.keys())[:1]:
            raise ValueError(f"{name} is in {found[name][0]} and {path}; a tensor has one place; copy the model again")
        found |= here
    return found


def likely_reason(missing: list[str], unexpected: list[str]) -> str:
    """A guess in words why the names in a file are not the model's names."""
    names = " ".join(unexpected)  # patterns from the most to the least specific
    for pattern, reason in (
        (r"(^| )score\.weight", "this is a reward model; open it with ScalarHead.from_pretrained"),
        (r"(^| )(_orig_mod|module)\.", "it was saved through torch.compile or DDP; save the inner module instead"),
        (r"experts\.gate_up_proj", "the experts are fused in memory order; write the folder with save_pretrained()"),
        (r"\.bias", "the layers have biases, so this is another architecture; use a Qwen3, Qwen3Moe or Dots1 folder"),
        (r"(^| )layers\.", "the names lack 'model.', so only the backbone was saved; save the model with its head"),
        (r"experts\.", "config.json and weights disagree about experts; check num_experts and n_shared_experts"),
        (r"lora", "this is an adapter, not a model; merge it first (lora.py)"),
    ):
        if re.search(pattern, names):
            return reason
    if missing == ["lm_head.weight"]:
        return "the head is tied to the embedding; set tie_word_embeddings to true in config.json"
    if any("experts." in name for name in missing):
        return "config.json and weights disagree about experts; check num_experts and n_shared_experts"
    return "config.json belongs to another model; check num_hidden_layers, or take both files from one folder"


def check_names(targets: dict, found: dict, folder: Path, optional: tuple[str, ...], ignore: tuple[str, ...]):
    """Compare the model's tensors with the files' headers. Raises: ValueError with the first differences."""
    missing = sorted(set(targets) - set(found) - set(optional))
    unexpected = sorted(set(found) - set(targets) - set(ignore))
    if missing or unexpected:
        listed = "".join(f", {word} {len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                         for word, names in (("missing", missing), ("unexpected", unexpected)) if names)
        raise ValueError(f"weights of {folder} do not fit{listed}; the names must be exactly the model's; "
                         f"likely reason: {likely_reason(missing, unexpected)}")
    for name in sorted(set(targets) & set(found)):  # the names fit: now shapes and types
        path, shape, dtype = found[name]
        if shape != tuple(targets[name].shape):
            raise ValueError(f"{name} in {path} has shape {list(shape)}; config.json asks for "
                             f"{list(targets[name].shape)}; take both files from one folder")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{name} in {path} has type {dtype}; weights are F32, F16, BF16 or F64; use a folder that "
                             "is not quantised")


class SkipInit(TorchFunctionMode):
    """Within this context nothing is initialised: the numbers come from a file."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("kaiming_uniform_", "normal_", "zero_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_model(build, config, folder: Path, device, dtype, absent: dict, ignore: tuple[str, ...] = ()) -> nn.Module:
    """build(config) with every parameter and persistent buffer read from the folder, strictly.

    config: the folder's ModelConfig; absent: name -> function(tensors) that makes a tensor the files may lack; ignore:
    tensors they may have too many. The module is built on the "meta" device and without initialisation: names and
    shapes are checked before any memory is taken, no time is lost on random numbers, and the global random state stays
    as it was (the exactness of a resumed run depends on it).
    """
    found = read_tensors(folder)
    # a million modules take minutes even without memory: what config.json asks for is compared with the files first
    layers = config.num_hidden_layers
    least = layers + config.num_experts * sum(map(config.is_moe_layer, range(layers)))
    if least > max(len(found), 4096):
        raise ValueError(f"num_hidden_layers={layers} with num_experts={config.num_experts} in {folder}; that is over "
                         f"{least} tensors, and the files hold {len(found)}; take config.json and weights from one "
                         "folder")
    with torch.device("meta"), SkipInit():
        model = build(config)
    check_names(model.state_dict(), found, folder, tuple(absent), ignore)
    tensors = {}
    for path in sorted({path for path, _, _ in found.values()}):
        with safe_open(path, "pt") as file:
            for name in sorted(set(file.keys()) - set(ignore)):
                # a copy: the file may be replaced while the model lives
                tensors[name] = file.get_tensor(name).to(device, dtype, copy=True)
    for name, make in absent.items():
        if name not in tensors:
            tensors[name] = make(tensors)
    model.load_state_dict(tensors, assign=True)  # assign: a meta parameter has no memory to copy into
    return model.to(device).eval()


def save_folder(model: nn.Module, folder, config: dict, skip: tuple[str, ...] = ()):
    """Write config.json, generation_config.json, model.safetensors; skip: tied weights, stored under another name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = config | {"torch_dtype": dtype, "dtype": dtype}  # transformers 4 reads the first, 5 the second
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = ids | {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items() if name not in skip}
    # transformers refuses files without this metadata
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

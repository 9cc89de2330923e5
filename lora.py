"""LoRA: fine-tune a model through thin matrices beside its frozen weights, and fold them in at the end.

    y = W x + (alpha / r) B A x        W [out, in] frozen;  A [r, in] random, B [out, r] zero at the start

What a fine-tuning adds to a weight has a low rank, the paper finds; so only a matrix of rank r is learnt: r (in + out)
numbers in place of in * out. Gradients, optimizer state and the file shrink with it. B = 0 makes the first step's
outputs those of the base, bit for bit. Merged, W + (alpha / r) B A is one matrix again: an answer costs what it did.

On the disk adapters are a folder in the layout of `peft`, which opens ours as this file opens its. As a program the
file folds such a folder into its base, without building a model:

    python lora.py merge --base out/pretrain --adapter out/sft/adapter --output out/merged

What it is not: no training (train_sft.py --lora_rank 8). Embedding, head, norms, routers and routed experts get no
adapters (choose() says why).

Paper: Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (arXiv:2106.09685).

Letters: r rank, A and B the two factors, W weight.
"""
import argparse
import copy
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "base_model.model."  # what peft's wrapper puts before the names of the model
# adapter_config.json: fields that do not change what stored adapters compute, and values that mean plain LoRA. Any
# other field that is set changes it (DoRA, rank-stabilised scale, trained biases ...), and so may one that a later
# peft invents: refused. Some ways to draw the first A and B (pissa, olora ...) change W as well.
HARMLESS = {"r", "lora_alpha", "lora_dropout", "task_type", "base_model_name_or_path", "revision", "target_modules",
            "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode",
            "auto_mapping", "megatron_core", "qalora_group_size", "peft_version", "runtime_config"}
# the ends are far beyond use: a broken file must not ask for a scale or a size that no computer has
LIMITS = {"r": (1, 2**16, [int]), "lora_alpha": (1e-9, 1e9, [int, float]), "lora_dropout": (0, 1, [int, float])}
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


class LoRALinear(nn.Linear):
    """A Linear layer with an adapter beside it. Its weight is the plain layer's own parameter under the same name, so
    files of the model fit before and after; A and B are called lora_A.weight and lora_B.weight, as in peft.

    Args: plain: the layer to adapt (no bias); rank; alpha: the adapter counts alpha / rank times; dropout: on the
        adapter's input, in training only.
    """

    def __init__(self, plain, rank, alpha, dropout=0.0):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        like = dict(bias=False, device=plain.weight.device, dtype=plain.weight.dtype)
        # nn.Linear starts Kaiming-uniform with a = sqrt(5): so does peft's A
        self.lora_A = nn.Linear(plain.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, plain.out_features, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        low = self.lora_A(F.dropout(x, self.dropout, self.training)) * self.scale  # [..., r]: scaled where it is small
        return super().forward(x) + self.lora_B(low)

    def merged_weight(self):
        """W + scale * B A as one matrix [out, in], in W's dtype."""
        return add_product(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)


@torch.no_grad()
def add_product(weight, a, b, scale):
    """W + scale * B A, summed in fp32 at least: weight [out, in], a [r, in], b [out, r] -> [out, in] in W's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Which layers
def choose(model, targets=()):
    """Full names of the layers of a model that get adapters.

    Args: targets: names or ends of names ("q_proj", "layers.0.mlp.up_proj"); none = every Linear layer of the blocks
        but routed experts.
    Raises: ValueError for a target that no such layer has.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and ".layers." in name]
    allowed = [name for name in linear if ".experts." not in name]
    for target in targets:
        if any(_ends(name, target) for name in allowed):
            continue
        why = "no linear layer of the blocks is called so"
        if "experts" in target.split(".") or any(_ends(name, target) for name in linear):
            why = ("routed experts get no adapters: each sees only the tokens that the router sends it, and "
                   "transformers keeps all in one tensor, for which peft's layout has no place")
        elif any(_ends(name, target) for name in modules if name.endswith("mlp.gate")):
            why = "the router gets no adapter: which experts a token visits is a part of the base"
        known = ", ".join(sorted({name.rpartition(".")[2] for name in allowed}))
        raise ValueError(f"--lora_targets {target}; {why}; name some of {known}")
    return [name for name in allowed if not targets or any(_ends(name, target) for target in targets)]


def _ends(name, target):
    """Whether `target` is the name or its end, at a dot: peft's own rule."""
    return f".{name}".endswith(f".{target}")


class Adapters:
    """The adapters of a model: freezes it, puts LoRALinear layers in place of plain ones, and stands for what is
    trained. state_dict(), load_state_dict() and save_pretrained() are those of a model, without the base.

    Args:
        model: module with weights; changed in place.
        rank, alpha, dropout: of every adapter. targets: see choose().
        base: folder of the base, written into what is saved.
        merge: save_pretrained() writes the merged model with adapter/ in it, else the adapters alone.
    """

    def __init__(self, model, rank, alpha, targets=(), dropout=0.0, base="", merge=True):
        self.model, self.base, self.merge = model, Path(base), merge
        self.settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self.names = choose(model, targets)
        self.base_size = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        for name in self.names:
            model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha, dropout))

    def summary(self):
        """One line for the start of a run."""
        count = sum(tensor.numel() for tensor in self.state_dict().values())
        return (f"LoRA of rank {self.settings['r']} beside {len(self.names)} layers: {count / 1e6:.2f}M parameters are "
                f"trained, {100 * count / self.base_size:.1f}% of the base's {self.base_size / 1e6:.2f}M")

    def state_dict(self, keep_vars=False):
        """{name: tensor} of A and B of all adapters; keep_vars as in torch's."""
        state = self.model.state_dict(keep_vars=keep_vars)
        return {name: tensor for name, tensor in state.items() if ".lora_" in name}

    def load_state_dict(self, state):
        """Copy A and B of all adapters in. Raises ValueError when names are missing or too many."""
        differ = sorted(state.keys() ^ self.state_dict().keys())
        if differ:
            raise ValueError(f"{len(differ)} adapter tensors do not fit, first {differ[0]}; they belong to other "
                             "layers; give the --lora_targets they were made with")
        self.model.load_state_dict(state, strict=False)  # strict asks for the base as well

    def merged(self):
        """A copy of the model with plain layers again; all that has no adapter is shared with the model, not copied."""
        merged = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        for name in self.names:
            layer = merged.get_submodule(name)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
            merged.set_submodule(name, plain)
        return merged

    def save_pretrained(self, folder):
        """Write a checkpoint folder: the merged model, or without merge only the base's config.json, which says what
        kind of model it is; and in both cases adapter/, which peft opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.merge:
            self.merged().save_pretrained(folder)
        for name in ("config.json", "generation_config.json") * (not self.merge):
            if (self.base / name).is_file():
                shutil.copyfile(self.base / name, folder / name)
        self.save_adapters(folder / "adapter")

    def save_adapters(self, folder):
        """Write adapter_config.json and adapter_model.safetensors, as peft names them."""
        folder.mkdir(parents=True, exist_ok=True)
        linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        last = sorted({name.rpartition(".")[2] for name in self.names})
        # peft adapts every layer whose name ends so; where that would be more than ours, full names say it exactly
        short = {name for name in linear if name.rpartition(".")[2] in last} == set(self.names)
        # peft takes names of MLP layers in a model with experts for those of routed ones; names of weights it leaves
        weights = [name for name in self.names if ".mlp." in name and any(".experts." in name for name in linear)]
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.base),
                    "inference_mode": True, "bias": "none", **self.settings,
                    "target_modules": last if short else [name for name in self.names if name not in weights]}
        if weights and not short:  # dropout, which only training uses, is not known there
            settings |= {"target_parameters": [f"{name}.weight" for name in weights], "lora_dropout": 0.0}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tensors = {PREFIX + name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, model, folder):
        """Put the adapters of a folder, ours or peft's, beside the layers of a model.

        Raises: FileNotFoundError, ValueError (damaged, of a kind that is not plain LoRA, for another model).
        """
        settings, pairs = read_adapters(folder)
        shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules()
                  if isinstance(module, nn.Linear)}
        check_fit({name: shapes.get(name) for name in pairs}, pairs, folder, "the model")
        self = cls(model, settings["r"], settings["lora_alpha"], list(pairs), settings.get("lora_dropout") or 0.0,
                   str(settings.get("base_model_name_or_path") or ""))
        self.load_state_dict({f"{name}.lora_{factor}.weight": tensor for name, pair in pairs.items()
                              for factor, tensor in zip("AB", pair, strict=True)})
        return self


# ----------------------------------------------------------------------------------------------------------------------
# The folder on disk
def read_settings(folder):
    """adapter_config.json as a dict. Raises: FileNotFoundError, ValueError that names a field which is not plain
    LoRA."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a folder of adapters holds it and adapter_model.safetensors; "
                                "give such a folder")
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object ({error}); the file is damaged; restore it") from None
    wrong = [name for name, value in settings.items()
             if not (value in PLAIN[name] if name in PLAIN else name in HARMLESS or not value)]
    # a layer's weight is the layer under another name; any other is a stack of experts
    named = settings.get("target_parameters") or []
    if not isinstance(named, list) or not all(str(name).endswith("_proj.weight") for name in named):
        wrong.append("target_parameters")
    wrong += ["peft_type"] * ("peft_type" not in settings)
    wrong += [name for name, (low, high, kinds) in LIMITS.items()
              if type(settings.get(name) or 0) not in kinds or not low <= (settings.get(name) or 0) <= high]
    if wrong:
        raise ValueError(f"{wrong[0]}={settings.get(wrong[0])!r} in {path}; only plain LoRA is read (A and B beside "
                         "linear layers, one rank, scale alpha / r); merge these adapters with peft, or train them "
                         "without it")
    return settings


def read_adapters(folder):
    """(settings, {name of the layer: (A [r, in], B [out, r])}) of a folder of adapters, checked against each other.

    Raises: FileNotFoundError, ValueError.
    """
    settings, path = read_settings(folder), Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pickled weights (.bin) are not opened; save the adapters with "
                                "safe_serialization")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); it is damaged or incomplete; copy it "
                         "again") from None
    pairs = {}
    for key in sorted(tensors):
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_A\.weight", key)
        b = tensors.get(key.replace(".lora_A.", ".lora_B.")) if match else None
        if b is not None and tensors[key].ndim == 2 and tensors[key].shape[:1] == b.shape[1:] == (settings["r"],):
            pairs[match[1]] = tensors[key], b
    odd = sorted(tensors.keys() ^ {f"{PREFIX}{name}.lora_{factor}.weight" for name in pairs for factor in "AB"})
    if odd or not pairs:
        raise ValueError(f"{path} holds {odd[0] if odd else 'nothing'}; it is pairs {PREFIX}<layer>.lora_A.weight [r, "
                         f"in] and lora_B.weight [out, r] with r {settings['r']}; take both files from one folder")
    return settings, pairs


def check_fit(shapes, pairs, folder, where):
    """ValueError unless `shapes` has the shape [out, in] of the layer of every pair (None where there is no such
    layer)."""
    for name, (a, b) in pairs.items():
        found = "is not there" if shapes[name] is None else f"has shape {list(shapes[name])}"
        if shapes[name] != (b.shape[0], a.shape[1]):
            raise ValueError(f"{name} {found} in {where}, but {folder} adapts a layer of shape "
                             f"{[b.shape[0], a.shape[1]]}; adapters fit only the model they were trained beside; give "
                             "that one as the base")


def alone(folder):
    """The adapter/ of a checkpoint that was saved without its model (--merge 0), else None."""
    adapter = Path(folder) / "adapter"
    return adapter if adapter.is_dir() and not any(Path(folder).glob("model*.safetensors")) else None


def base_of(adapter):
    """Folder of the model that a folder of adapters names. Raises FileNotFoundError where it is not there."""
    named = Path(str(read_settings(adapter).get("base_model_name_or_path") or "?"))
    # the path was written where the training ran; a whole out/ may have moved since, and the base with it
    for place in (named, Path(adapter).resolve().parents[1] / named.name):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"the base {named} of {adapter} is not there; adapters are no model without their base; "
                            "bring it back, or give it: python lora.py merge --base ...")


def merge_folders(base, adapter, output):
    """Write the folder `output`: the base with the adapters folded into its weights, file by file.

    Each product is summed in fp32 at least, then stored in the type the base has. Returns the number of layers merged.
    Raises: FileNotFoundError, FileExistsError, ValueError.
    """
    base, output = Path(base), Path(output)
    settings, pairs = read_adapters(adapter)
    files = sorted(base.glob("model*.safetensors"))
    if not (base / "config.json").is_file() or not files:
        raise FileNotFoundError(f"{base} holds no model (config.json and model*.safetensors); adapters are merged into "
                                "the one they were trained beside; give it as --base")
    if output.exists():
        raise FileExistsError(f"{output} is there already; a merge replaces nothing; give another --output")
    shapes = dict.fromkeys(pairs)
    for file in files:
        with safe_open(file, "pt") as opened:
            shapes |= {name.removesuffix(".weight"): tuple(opened.get_slice(name).get_shape())
                       for name in opened.keys() if name.removesuffix(".weight") in pairs}
    check_fit(shapes, pairs, adapter, base)
    # into a folder beside it, renamed when it is whole
    tmp = output.with_name(output.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for file in base.iterdir():  # config and tokenizer; minillm.json tells the base's story, not this one's
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != "minillm.json":
            shutil.copyfile(file, tmp / file.name)
    for file in files:
        tensors = load_file(file)
        for name in [n for n in tensors if n.removesuffix(".weight") in pairs]:
            a, b = pairs[name.removesuffix(".weight")]
            tensors[name] = add_product(tensors[name], a, b, settings["lora_alpha"] / settings["r"])
        save_file(tensors, tmp / file.name, metadata={"format": "pt"})
    os.replace(tmp, output)
    return len(pairs)


# ----------------------------------------------------------------------------------------------------------------------
# python lora.py merge
def parse_args(argv=None):
    """Flags of the one command. Hyphens are accepted for underscores, abbreviations are not."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{merge}")
    about = "fold a folder of adapters into the weights of its base"
    sub = commands.add_parser("merge", help=about, description=about, allow_abbrev=False)
    sub.add_argument("--base", default="", help="folder of the model; left out: the one that the adapters name")
    sub.add_argument("--adapter", required=True, help="folder with adapter_config.json, ours or peft's")
    sub.add_argument("--output", required=True, help="folder to write; it must not be there yet")
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    return parser.parse_args(argv)


def main(args):
    """Merge. Returns its facts, as every script here does."""
    base = args.base or base_of(args.adapter)
    layers = merge_folders(base, args.adapter, args.output)
    print(f"merged {layers} layers of {args.adapter} into {base}: {args.output}")
    return {"base": str(base), "layers": layers, "output": args.output}


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

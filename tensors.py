"""Rows of a data set as padded tensors in one file, for programs that know nothing of this project.

    input_ids   [N, T]   padded on the right
    labels      [N, T]   the ids that are trained, -100 elsewhere; not shifted, as models of transformers expect
    loss_mask   [N, T]   1 where something is trained
    lengths     [N]      tokens of each row

Pairs have all four twice, as chosen_... and rejected_... Letters: N rows, T tokens of the longest row.

What this file does not do: read or tokenize text; it is given a data set (dataset.py).
Commands: used by prepare_data.py export.
"""
import os
import zipfile

import numpy as np
import torch


def loses_first(kind, tokenizer, add_bos):
    """Whether rows are written without the first token that a data set of this kind gives them: a bos that is not asked
    for, or the end token that stands in its place before a document. What opens a conversation of MiniMind's tokenizer
    is no bos but the <|im_start|> of its first turn, and stays."""
    if kind == "pretrain":
        return not add_bos or tokenizer.bos_id is None
    return not add_bos and tokenizer.bos_id not in (None, tokenizer.im_start_id)


def sequences(data, add_bos, add_eos):
    """Yield the rows of a data set as lists of (name, ids, mask), in file order; mask 1 on what training would train.

    data: PretrainData (a row is a document, cut at max_seq_len and counted in its stats), SFTData or PreferenceData.
    """
    cut = loses_first(data.kind, data.tokenizer, add_bos)
    for i in range(_count(data)):
        if data.kind == "preference":
            head = int(data.prompt_length[i][0])
            rows = [(f"{side}_", ids.tolist(), [0] * head + [1] * (len(ids) - head))
                    for side, ids in (("chosen", data.chosen[i]), ("rejected", data.rejected[i]))]
        elif data.kind == "sft":
            rows = [("", data.tokens[i].tolist(), data.trained[i].tolist())]
        else:
            ids = data.tokens[i].tolist() + [data.tokenizer.eos_id] * add_eos
            data.stats["truncated"] += len(ids) > data.max_seq_len
            ids = ids[:data.max_seq_len]
            rows = [("", ids, [0] + [1] * (len(ids) - 1))]
        yield [(name, ids[1:], [0, *mask[2:]]) for name, ids, mask in rows] if cut else rows


def _count(data):
    """Conversations, documents or pairs of a data set (its own length counts packed rows or windows)."""
    return len(getattr(data, next(iter(data.columns))))


def fill(data, add_bos, add_eos, folder):
    """Write the rows of a data set into .npy files in `folder`; returns {name: mapped array} with the names above."""
    sides = ("chosen", "rejected") if data.kind == "preference" else ("tokens",)
    longest = max(int(getattr(data, side).lengths.max()) for side in sides) + add_eos
    width = min(data.max_seq_len, longest) - loses_first(data.kind, data.tokenizer, add_bos)
    kinds = {"input_ids": np.int32, "labels": np.int32, "loss_mask": np.uint8, "lengths": np.int32}
    arrays = {name + kind: np.lib.format.open_memmap(folder / f"{name}{kind}.npy", "w+", dtype,
                                                     (_count(data), width)[:1 + (kind != "lengths")])  # [N, T] or [N]
              for name in (f"{side}_" if len(sides) > 1 else "" for side in sides) for kind, dtype in kinds.items()}
    for i, rows in enumerate(sequences(data, add_bos, add_eos)):
        for name, ids, mask in rows:
            labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
            padding = width - len(ids)
            arrays[f"{name}input_ids"][i] = ids + [data.tokenizer.pad_id] * padding
            arrays[f"{name}labels"][i] = labels + [-100] * padding
            arrays[f"{name}loss_mask"][i] = mask + [0] * padding
            arrays[f"{name}lengths"][i] = len(ids)
    return arrays


def save(arrays, folder, path, form):
    """Write what fill() left in `folder` as one file, npz or pt (a dict of int64 tensors), which takes its name when it
    is whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    if form == "npz":
        for x in arrays.values():
            x.flush()
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in arrays:
                archive.write(folder / f"{name}.npy", f"{name}.npy")
    else:
        # int64, because torch's cross_entropy takes no other labels
        torch.save({name: torch.from_numpy(x).long() for name, x in arrays.items()}, temporary)
    os.replace(temporary, path)

"""Public sets by name: where they lie, and how a file comes to be here whole.

A file is asked of several mirrors in turn. A broken transfer goes on where it stopped, now or at the next start; what
has arrived is called .part until its size, and its SHA-256 where one is known, are right. So a file that has its name
is whole, whatever happened on the way.

What this file does not do: read the files (rows.py, tasks.py). Sizes, licences and addresses: docs/data.md.
Standards: range requests, RFC 9110, sections 13 and 14.
Commands: used by prepare_data.py download.
"""
import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

MIRRORS = {"huggingface": "https://huggingface.co", "hf-mirror": "https://hf-mirror.com", "modelscope": ""}
ATTEMPTS = 5      # in a row that bring nothing, before the next mirror is asked
PATIENCE = 30.0   # seconds without a byte that count as a broken connection
LONGEST_WAIT = 60
OFFLINE = "without a network the embedded data serve: python make_data.py"

# ---------------------------------------------------------------------------------------------------------------------
# 1. The sets


@dataclass(frozen=True)
class Public:
    """A public set: where it lies, and what is known about it."""

    repo: str                                   # id on the Hugging Face hub, perhaps @revision; or an address
    files: dict                                 # path there -> megabytes, 0 = not known
    licence: str
    shards: str = ""                            # path of shard number {}, of which --shards are fetched
    shard_mb: int = 0
    modelscope: str = ""                        # id on ModelScope, where it is there as well
    sha256: dict = field(default_factory=dict)  # path -> hash, where known; the hub states most others itself
    note: str = ""


def _minimind(mb, name, note=""):
    return Public("jingyaogong/minimind_dataset", {f"{name}.jsonl": mb}, "Apache-2.0 and CC BY-NC 2.0 (the card names "
                  "both)", modelscope="gongjy/minimind_dataset", note=note)


# MiniMind's files with their megabytes: the current names, and those until the end of 2025
MINIMIND = {"pretrain_t2t_mini": 1200, "pretrain_t2t": 10_000, "sft_t2t_mini": 1600, "sft_t2t": 14_000, "dpo": 53,
            "rlaif": 24, "agent_rl": 86, "agent_rl_math": 18}
MINIMIND_OLD = {"pretrain_hq": 1600, "sft_mini_512": 1200, "sft_512": 7500, "sft_1024": 5600, "sft_2048": 9000,
                "r1_mix_1024": 340, "rlaif-mini": 1, "lora_identity": 1, "lora_medical": 34}
STATED = "as generally stated, read its card"  # behind a licence that was not read at its source
GITHUB = "https://raw.githubusercontent.com/"
SETS = {
    **{name: _minimind(mb, name) for name, mb in MINIMIND.items()},
    **{name: _minimind(mb, name, f"a name of 2025; where it is gone, take one of {', '.join(MINIMIND)}")
       for name, mb in MINIMIND_OLD.items()},
    "tinystories": Public("roneneldan/TinyStories", {"TinyStoriesV2-GPT4-train.txt": 2230,
                                                     "TinyStoriesV2-GPT4-valid.txt": 23}, "CDLA-Sharing-1.0"),
    "fineweb-edu": Public("HuggingFaceFW/fineweb-edu", {}, "ODC-By 1.0", "sample/10BT/{:03d}_00000.parquet"),
    "climbmix": Public("karpathy/climbmix-400b-shuffle", {"shard_06542.parquet": 100}, "made from "
                       "nvidia/Nemotron-ClimbMix, which is for non-commercial use; read both cards",
                       "shard_{:05d}.parquet", 100, note="shard 6542 is for validation"),
    "smol-smoltalk": Public("HuggingFaceTB/smol-smoltalk", {"data/test-00000-of-00001.parquet": 48}, "Apache-2.0",
                            "data/train-{:05d}-of-00004.parquet", 230),
    "smoltalk": Public("HuggingFaceTB/smoltalk", {}, "Apache-2.0", "data/all/train-{:05d}-of-00009.parquet", 223),
    "ultrafeedback": Public("HuggingFaceH4/ultrafeedback_binarized", {"data/train_prefs-00000-of-00001.parquet": 222,
                                                                      "data/test_prefs-00000-of-00001.parquet": 7},
                            "MIT"),
    "dpo-en-zh-20k": Public("llamafactory/DPO-En-Zh-20k", {"dpo_en.json": 51, "dpo_zh.json": 29}, "Apache-2.0"),
    "hellaswag": Public(f"{GITHUB}rowanz/hellaswag/master", {"data/hellaswag_val.jsonl": 0}, "MIT", sha256={
        "data/hellaswag_val.jsonl": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"}),
    "gsm8k": Public(f"{GITHUB}openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data",
                    {"test.jsonl": 1, "train.jsonl": 4}, "MIT", sha256={
        "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}),
    "arc_easy": Public("allenai/ai2_arc", {"ARC-Easy/test-00000-of-00001.parquet": 0}, f"CC BY-SA 4.0 ({STATED})"),
    "arc_challenge": Public("allenai/ai2_arc", {"ARC-Challenge/test-00000-of-00001.parquet": 0},
                            f"CC BY-SA 4.0 ({STATED})"),
    "winogrande": Public("allenai/winogrande", {"winogrande_xl/validation-00000-of-00001.parquet": 0},
                         f"CC BY ({STATED})"),
    "piqa": Public("ybisk/piqa@078a131412f46a38025a762322c174a8bae2610c", {"plain_text/piqa-validation.parquet": 0},
                   f"AFL-3.0 ({STATED})"),
    "boolq": Public("google/boolq", {"data/validation-00000-of-00001.parquet": 0}, f"CC BY-SA 3.0 ({STATED})"),
    "lambada": Public("EleutherAI/lambada_openai", {"data/lambada_test_en.jsonl": 2}, "MIT"),
    "wikitext2": Public("Salesforce/wikitext", {"wikitext-2-raw-v1/test-00000-of-00001.parquet": 1},
                        "CC BY-SA 3.0 and GFDL"),
    "mmlu": Public("cais/mmlu", {"all/test-00000-of-00001.parquet": 0, "all/dev-00000-of-00001.parquet": 0},
                   f"MIT ({STATED})"),
    "ceval": Public("ceval/ceval-exam", {"ceval-exam.zip": 2}, "CC BY-NC-SA 4.0"),
    "cmmlu": Public("haonan-li/cmmlu", {"cmmlu_v1_0_1.zip": 0}, "CC BY-NC-SA 4.0"),
}
GROUPS = {"minimind": ("pretrain_t2t_mini", "sft_t2t_mini", "dpo"),
          "eval": ("hellaswag", "arc_easy", "arc_challenge", "winogrande", "piqa", "boolq", "lambada", "wikitext2",
                   "ceval", "cmmlu", "mmlu", "gsm8k")}


# ---------------------------------------------------------------------------------------------------------------------
# 2. One file, whole


class NotThere(Exception):  # noqa: N818 - a mirror's answer: asking it again would not help
    """Raised for a mirror that does not have the file, refuses it, or cannot be reached."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps what the hub states about a large file on the first answer: its SHA-256."""

    def __init__(self):
        self.sha256 = ""

    def note(self, headers):
        """Keep the hash that the headers of an answer state, if they do."""
        stated = headers.get("X-Linked-Etag", "").strip('"')
        self.sha256 = self.sha256 or (stated if re.fullmatch("[0-9a-f]{64}", stated) else "")

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Called by urllib for a redirect."""
        self.note(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def mirror_list(asked):
    """Mirrors (names or addresses) in the order in which they are tried: those `asked` for; else that of the variable
    HF_ENDPOINT, where it is set, and all known ones. Raises ValueError."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    mirrors = asked or [*([endpoint] if endpoint else []), *MIRRORS]
    for mirror in mirrors:
        if mirror not in MIRRORS and not mirror.startswith(("http://", "https://")):
            raise ValueError(f"--mirror {mirror}; a mirror is one of {', '.join(MIRRORS)}, or an address with https:// "
                             "(HF_ENDPOINT as well); correct it")
    return mirrors


def addresses(public, path, mirrors):
    """The addresses of a file, in the order in which they are tried."""
    path = urllib.parse.quote(path)
    if public.repo.startswith("http"):
        return [f"{public.repo}/{path}"]
    repo, _, revision = public.repo.partition("@")
    return [f"https://www.modelscope.cn/datasets/{public.modelscope}/resolve/master/{path}" if mirror == "modelscope"
            else f"{MIRRORS.get(mirror, mirror).rstrip('/')}/datasets/{repo}/resolve/{revision or 'main'}/{path}"
            for mirror in mirrors if mirror != "modelscope" or public.modelscope]


def check_space(folder, needed, path):
    """Raise OSError where `needed` bytes do not fit on the disk of `folder`, with some room left to work."""
    free = shutil.disk_usage(folder).free
    if free < needed + (100 << 20):
        raise OSError(f"{path}: {needed / 1e6:.0f} MB are still to come and {free / 1e6:.0f} MB are free in {folder}; "
                      "a download leaves 100 MB free; make room, or give another disk with --output")


def request(url, part, state):
    """One request: append what is missing to the file `part`.

    `state` remembers between requests what the server said of the file: etag, size, sha256. A server whose file has
    changed since then sends it whole (If-Range), and the part begins anew.
    Raises NotThere, ConnectionError for a transfer that ended early, urllib's and http's own errors.
    """
    have = part.stat().st_size if part.exists() and state.get("etag") else 0
    headers = {"User-Agent": "MiniLLM", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": state["etag"]}
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise NotThere("it sends a web page instead of the file")
        span = re.match(r"bytes (\d{1,18})-", answer.headers.get("Content-Range", "")) if answer.status == 206 else None
        if not span or int(span[1]) != have:
            have = 0
            if answer.status == 206:
                raise NotThere("it sends another part than was asked for")
        redirects.note(answer.headers)
        length = answer.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{0,18}", length):
            raise NotThere(f"it states a length of {length!r:.60}")
        etag = answer.headers.get("ETag", "")
        # a weak etag vouches for a meaning, not for bytes: nothing can be appended to such a file
        state |= {"etag": "" if etag.startswith("W/") else etag, "size": have + int(length) if length else None,
                  "sha256": redirects.sha256 or state.get("sha256", "")}
        check_space(part.parent, (state["size"] or 0) - have, part.name)
        part.with_suffix(".state").write_text(json.dumps(state), encoding="utf-8")
        bar = tqdm(total=state["size"], initial=have, desc=part.stem, unit="B", unit_scale=True,
                   mininterval=0.5 if sys.stderr.isatty() else 15)  # a log file gets a line now and then
        with bar, open(part, "ab" if have else "wb") as file:
            while block := answer.read1(1 << 18):  # what is there: a full block may never come
                bar.update(file.write(block))
    got = part.stat().st_size
    if state["size"] is not None and got < state["size"]:
        raise ConnectionError(f"the connection ended after {got} of {state['size']} bytes")


def _after(error, tries):
    """Seconds to wait before the next request: as the server asks, else longer each time. Raises NotThere where
    another request is useless."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code not in (408, 416, 425, 429) and error.code < 500:
            raise NotThere(f"HTTP {error.code} {error.reason}") from None
        asked = error.headers.get("Retry-After", "")
        return min(LONGEST_WAIT, int(asked)) if asked.isdigit() else min(LONGEST_WAIT, 2**tries)
    reason = getattr(error, "reason", error)
    # urllib wraps what fails before the answer begins: a mirror that cannot be reached at all is left at once
    unreachable = isinstance(error, urllib.error.URLError) and isinstance(reason, OSError) and (
        isinstance(reason, (socket.gaierror, TimeoutError, ConnectionRefusedError, ssl.SSLCertVerificationError))
        or reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH))
    if unreachable:
        raise NotThere(str(reason)) from None
    return min(LONGEST_WAIT, 2**tries)


def fetch(url, path, sha256=""):
    """Download one address to `path`, going on with what an earlier call has left. The file takes its name only when
    it is whole: of the stated size, and of the hash where one is known. Returns whether a hash was compared.

    Raises NotThere where this mirror cannot serve it, OSError where the disk is full.
    """
    part = path.with_name(f"{path.name}.part")
    state, tries = {}, 0
    with contextlib.suppress(OSError, ValueError):
        state = json.loads(part.with_suffix(".state").read_text(encoding="utf-8"))
    # stopped between the last byte and the rename: there is nothing left to ask for
    whole = bool(state.get("etag")) and part.exists() and part.stat().st_size == state.get("size")
    while not whole:
        before = part.stat().st_size if part.exists() else 0
        try:
            request(url, part, state)
            whole = True
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            if getattr(error, "code", 0) == 416:
                state.clear()  # what is there is longer than the file: begin anew
            after = part.stat().st_size if part.exists() else 0
            tries = 0 if after > before else tries + 1
            if tries >= ATTEMPTS:
                raise NotThere(f"{error}, {ATTEMPTS} times in a row") from None
            wait = _after(error, tries)
            kept = after if state.get("etag") else 0  # without one nobody knows whether it is still the same file
            print(f"{path.name}: {error}; trying again in {wait} s, {kept} bytes are kept", flush=True)
            time.sleep(wait)
    wanted, found, size = sha256 or state.get("sha256", ""), file_hash(part), part.stat().st_size
    part.with_suffix(".state").unlink()
    if not size or state["size"] not in (None, size) or wanted not in ("", found):
        part.unlink()
        raise NotThere(f"what came is not the file: {size} bytes of {state['size']}, SHA-256 {found}, not {wanted}")
    os.replace(part, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {found} "
          f"({'as stated' if wanted else 'nothing to compare it with is known'})", flush=True)
    return bool(wanted)


def file_hash(path):
    """SHA-256 of a file, forced to the disk before it is trusted."""
    digest = hashlib.sha256()
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(path):
    """Unpack a .zip into a folder beside it, which appears only when all of it is there. Raises ValueError."""
    folder = path.with_suffix("")
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            check_space(path.parent, sum(entry.file_size for entry in archive.infolist()), path)
            archive.extractall(temporary)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: {error}; it must be a whole archive; delete it and download it again") from None
    os.replace(temporary, folder)
    print(f"{folder}: unpacked")


def get(public, source, path, mirrors):
    """Bring the file `source` of a set to `path` from the first mirror that has it. Raises OSError where none does."""
    if path.exists() and path.stat().st_size:
        print(f"{path}: is there already; delete it to fetch it again")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        tried = []
        for url in addresses(public, source, mirrors):
            try:
                fetch(url, path, public.sha256.get(source, ""))
                break
            except NotThere as error:
                tried.append(f"{urllib.parse.urlsplit(url).netloc}: {error}")
                print(f"{path.name}: {tried[-1]}", flush=True)
        else:
            raise OSError(f"{source}: no mirror has served it ({' | '.join(tried) or 'it is not on this one'}); it "
                          f"needs a network and a mirror that has it; try again later, or another --mirror; {OFFLINE}")
    return path


def get_set(name, folder, mirrors, shards=1):
    """Bring the files of a set into folder/name, of a set in shards the first ones, and unpack archives. Returns the
    paths. Raises OSError where a file is not to be had."""
    public = SETS[name]
    print(f"{name}: licence {public.licence}{public.note and f'; {public.note}'}", flush=True)
    stated = re.search(r"-of-(\d+)", public.shards)
    if stated and shards > int(stated[1]):
        shards = int(stated[1])
        print(f"{name}: has {shards} shards; all of them are fetched", flush=True)
    sources = list(public.files) + [public.shards.format(i) for i in range(shards) if public.shards]
    paths = [get(public, source, Path(folder) / name / Path(source).name, mirrors) for source in sources]
    for path in paths:
        if path.suffix == ".zip" and not path.with_suffix("").exists():
            unpack(path)
    return paths

"""Prepare data of one's own: mix sources, look at a file, fetch public sets, write tensors for other programs.

    mix       sources by category -> {pretrain,sft,preference,rl}.{train,heldout}.jsonl, which the scripts train on;
              without duplicates, and without the items of evaluation files
    inspect   lengths, languages, duplicates, samples and the trained share of any file that the scripts can read
    download  public sets by name, from several mirrors, resumed and checked
    export    input_ids, labels and loss_mask as .npz or .pt; or the rows themselves as .jsonl

How mix works. It reads everything twice. The first pass filters the rows and keeps thirteen numbers of each: a hash of
its text, one of its question, and eleven of its MinHash signature. They wait on the disk, and one column at a time
comes into memory, which so does not grow with the text. Then rows are chosen by hash, so that a second run picks the
same ones, and the second pass writes them. What leaves, and why: selection.py.

What this file does not do: clean text (it drops rows, it does not change them).

    python prepare_data.py mix --config mix.json --output out/data
    python prepare_data.py inspect my/chats.jsonl --tokenizer out/tokenizer
    python prepare_data.py download tinystories
    python prepare_data.py export --stage sft --data_path out/data/sft.train.jsonl --tokenizer out/tokenizer
"""
import contextlib
import json
import os
import tempfile
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

import cli
import common
import dataset
import logs
import tensors
from download import GITHUB, GROUPS, MIRRORS, SETS, get_set, mirror_list
from rows import conversation, document_hash, expand_paths, first_question, preference, question, read_rows
from selection import Contamination, Fingerprints, Source, language, plan, read_config, sizes_itself
from tokenizer import ROLES, Tokenizer

STAGES = ("pretrain", "sft", "preference", "rl")
OUTPUTS = [f"{stage}.{part}.jsonl" for stage in STAGES for part in ("train", "heldout")]
FORMATS = ("npz", "pt", "jsonl")  # of export
KEPT = ("answer", "check", "lang", "skill", "kind")  # fields beside the text that the scripts and scores know
# what rows of public benchmarks ask or show; their answers are too short to be told from other text
ASKED = ("question", "Question", "query", "ctx", "context", "context_options", "passage", "sentence", "goal", "sol1",
         "sol2", "problem", "prompt")
TASK = ("instruction", "input", "history")  # Alpaca's columns: only together they are what is asked


# ---------------------------------------------------------------------------------------------------------------------
# 1. Rows


def rename(row, mapping, where):
    """The row with the columns that `mapping` {our field: column} names under our names; the others stay as they are.
    Raises ValueError for a column that is not there."""
    missing = [column for column in mapping.values() if column not in row]
    if missing:
        raise ValueError(f"{where}: found the keys [{', '.join(map(str, row))}]; the map wants {', '.join(missing)}; "
                         "write the map as field=column with columns of the file")
    taken = set(mapping.values())
    return {**{key: value for key, value in row.items() if key not in taken},
            **{name: row[column] for name, column in mapping.items()}}


def _turn(turn, where):
    """A turn with the fields that training reads. Raises ValueError for a role that the tokenizer refuses."""
    if turn["role"] not in ROLES:
        raise ValueError(f"{where}: found the role {turn['role']!r}; expected one of {', '.join(ROLES)}; rename it")
    kept = {"role": turn["role"], "content": turn["content"]}
    return kept | ({"reasoning_content": turn["reasoning_content"]} if turn.get("reasoning_content") else {})


def standard_row(row, where="row"):
    """(stage, row in the form of that stage, reason to leave it out or ""): its keys decide which stage it is for.

    chosen and rejected: preference; text: pretrain; turns that end with an answer: sft, without one: rl. Raises
    ValueError for a row of no known shape.
    """
    kept = {key: row[key] for key in KEPT if row.get(key) is not None}
    if row.get("chosen") is not None:
        prompt, *sides = preference(row, where)
        prompt, sides = [_turn(turn, where) for turn in prompt], [_turn(turn, where) for turn in sides]
        texts = [turn["content"] if len(turn) == 2 else [turn] for turn in sides]
        reason = "empty" if not all(turn["content"].strip() for turn in sides) else (
            "equal answers" if texts[0] == texts[1] else "")
        said = prompt[0]["content"] if [turn["role"] for turn in prompt] == ["user"] else prompt
        return "preference", {"prompt": said, "chosen": texts[0], "rejected": texts[1], **kept}, reason
    if row.get("text") is not None:
        if not isinstance(row["text"], str):
            raise ValueError(f"{where}: found {row['text']!r:.60} as text; expected a string; write {{\"text\": ...}}")
        return "pretrain", {"text": row["text"], **kept}, "" if row["text"].strip() else "empty"
    turns = conversation(row, where)
    tools = any(turn.get("tool_calls") for turn in turns)  # the tokenizer does not render them
    turns = [_turn(turn, where) for turn in turns]
    if len(turns) > 1 and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()  # prompts for reinforcement learning often come with an empty answer
    reason = "tool calls" if tools else "" if any(turn["content"].strip() for turn in turns) else "empty"
    stage = "sft" if turns[-1]["role"] == "assistant" else "rl"
    return stage, {"conversations": turns, **kept}, reason


def turns_of(row):
    """Lists of turns of a standard row: one conversation, or those with the chosen and with the rejected answer."""
    if "conversations" in row:
        return [row["conversations"]]
    prompt, chosen, rejected = preference(row)
    return [[*prompt, chosen], [*prompt, rejected]]


def text_of(row):
    """All text of a standard row: what its length, its language and its likeness to others are taken from."""
    if "text" in row:
        return row["text"]
    (first, *others) = turns_of(row)
    said = [f"{turn['role']}\n{turn['content']}\n{turn.get('reasoning_content', '')}" for turn in first]
    return "\n".join(said + [turns[-1]["content"] for turns in others])


def question_of(row):
    """What decides whether a standard row is held out, as in training: the document, or the first question."""
    return row["text"] if "text" in row else first_question(turns_of(row)[0])


def parts_of(row, roles=ROLES):
    """The texts of a standard row one by one: the document, or what every turn of one of the roles says."""
    if "text" in row:
        return [row["text"]]
    return [said for turns in turns_of(row) for turn in turns if turn["role"] in roles
            for said in (turn["content"], turn.get("reasoning_content")) if said]


def item_texts(row, where="row"):
    """What must not be trained of a row of an evaluation file: questions and contexts in the layouts of public
    benchmarks, else what question_of() says. Raises ValueError for a row without such a text."""
    if "sentence" in row and "option1" in row:  # Winogrande's gap, filled
        gap, *names = said = [row.get(key) for key in ("sentence", "option1", "option2")]
        if not all(isinstance(text, str) for text in said):
            raise ValueError(f"{where}: found {said!r:.100} as sentence, option1 and option2; expected three strings; "
                             "correct the row")
        return [gap.replace("_", name) for name in names]
    found = [text for key in ASKED if key in row for text in (row[key] if isinstance(row[key], list) else [row[key]])]
    found = [text.removeprefix("Question: ").removesuffix("\nAnswer:") for text in found if isinstance(text, str)]
    if isinstance(row.get("instruction"), str):
        turns, _ = question({key: row[key] for key in TASK if key in row}, where)
        found += [turn["content"] for turn in turns if turn["role"] == "user"]
    return found or [question_of(standard_row(row, where)[1])]


def read_items(paths, skip_bad):
    """Contamination with the items of evaluation files (any that read_rows reads). Raises ValueError."""
    items, bad = Contamination(), []
    for row, where in read_rows(paths, skip_bad, bad):
        for text in item_texts(row, where):
            items.add(text, where)
    print(f"{len(items.places)} texts of evaluation items are looked for", flush=True)
    if bad:
        print(f"skipped {len(bad)} bad rows of evaluation files; the first: {bad[0]}")
    return items


# ---------------------------------------------------------------------------------------------------------------------
# 2. mix


def source_rows(source, skip_bad, counts, bad):
    """Stream (stage, standard row, text, "file:line") of the rows that pass the filters of a source. What is left out
    is counted by reason in `counts`; messages of bad rows, which only --skip_bad survives, are added to `bad`."""
    for row, where in read_rows(source.path, skip_bad, bad):
        counts["read"] += 1
        if any(row.get(key) != value for key, value in source.where.items()):
            counts["not asked for"] += 1
            continue
        try:
            stage, new, reason = standard_row(rename(row, source.map, where), where)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"source {source.name}: {error}; or rename columns with a map (--map text=COLUMN), "
                                 "or skip such rows with --skip_bad 1") from None
            bad.append(str(error))
            continue
        text = "" if reason else text_of(new)
        reason = reason or source.refusal(text)
        if reason:
            counts[reason] += 1
            continue
        own = row.get("source")
        yield stage, new | ({"source": own} if isinstance(own, str) and own else {}), text, where


def json_line(value, indent=None):
    """A row as a line of .jsonl, or with an indent a whole JSON file, bytes."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode() + b"\n"  # lone surrogates, which UTF-8 refuses, stay escapes


class Outputs:
    """The files of a mix, written under other names until all of them are whole."""

    def __init__(self, folder):
        self.folder, self.files, self.facts = Path(folder), {}, {}

    def write(self, stage, part, row, times):
        """Append a row to {stage}.{part}.jsonl, several times."""
        name = f"{stage}.{part}.jsonl"
        if name not in self.files:
            self.files[name] = open(self.folder / f"{name}.tmp", "wb")
            self.facts[name] = {"rows": 0, "bytes": 0}
        self.facts[name]["rows"] += times
        self.facts[name]["bytes"] += self.files[name].write(json_line(row) * times)

    def commit(self):
        """Give every file its name."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def discard(self):
        """Remove what was not committed."""
        for name, file in self.files.items():
            file.close()
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)


def _add(prints, stage, row, text):
    """Give a standard row to the Fingerprints. Equal texts for different stages are no duplicates."""
    prints.add(document_hash(f"{stage}\n{text}"), document_hash(question_of(row)), text, STAGES.index(stage))


def _fingerprint(prints, items, sources, skip_bad, counts):
    """The first pass: fill `prints` and `counts`. Returns the number of rows that every source has left, the numbers of
    the rows in which one of `items` (Contamination) stands, and {source name: the first such case}."""
    sizes, contaminated, examples = [], [], {}
    for source in sources:
        before, bad = prints.count, []
        for stage, row, text, where in source_rows(source, skip_bad, counts[source.name], bad):
            if found := items.find(parts_of(row), parts_of(row, ["user"])):
                contaminated.append(prints.count)
                examples.setdefault(source.name, {"row": where, **found})
            _add(prints, stage, row, text)
        counts[source.name]["bad"] = len(bad)
        if bad:
            print(f"source {source.name}: skipped {len(bad)} bad rows; the first: {bad[0]}")
        sizes.append(prints.count - before)
        print(f"source {source.name}: {counts[source.name]['read']} rows read, {sizes[-1]} left by the filters",
              flush=True)
    return sizes, contaminated, examples


def _write(outputs, sources, skip_bad, sizes, copies, heldout, counts):
    """The second pass: write the chosen rows, and count them."""
    number = 0
    for source, size in zip(sources, sizes, strict=True):
        end = number + size
        for stage, row, *_ in source_rows(source, skip_bad, Counter(), []):
            if number < end and (copies[number] or heldout[number]):
                part, times = ("heldout", 1) if heldout[number] else ("train", int(copies[number]))
                row["source"] = f"{source.name}/{row['source']}" if "source" in row else source.name
                row["category"] = source.category
                outputs.write(stage, part, row, times)
                counts[source.name][part] += times
                counts[source.name]["different rows"] += 1
            number += 1
        if number != end:
            raise ValueError(f"source {source.name}: its files changed while they were read; both passes must see the "
                             "same rows; start again when nothing writes to them")


def _warnings(sources, targets, counts, examples, ratio, folder, facts):
    """What a reader of the stats should not miss, as lines. targets: those that the config itself sets."""
    for source in sources:
        found = counts[source.name]
        if not found["train"] + found["heldout"]:
            lost = ", ".join(f"{count} {reason}" for reason, count in found.items() if count and reason != "read")
            yield f"source {source.name} ended empty: {found['read']} rows read{lost and f', {lost}'}"
        if first := examples.get(source.name):
            yield (f"source {source.name}: {found['contaminated']} rows left out because evaluation items are in them; "
                   f"the first: {first['row']} has the {first['kind']} as {first['item']}: {first['text']!r}")
    for category, target in sorted(targets.items()):
        got = sum(counts[source.name][part] for source in sources for part in ("train", "heldout")
                  if source.category == category)
        wanted = round((target["count"] or 0) * ratio)
        if got < 0.99 * wanted:
            yield (f"category {category}: {got} of {wanted} rows; add sources, or raise its max_repeat "
                   f"({target['max_repeat']})")
    for name in OUTPUTS:
        if name not in facts and (folder / name).exists():
            yield f"{folder / name} is older than this mix, which has no such rows"


def mix(args):
    """Write the mix that --config describes and its dataset_stats.json; returns the stats."""
    sources, targets, config = read_config(args.config)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if {(folder / name).resolve() for name in OUTPUTS} & {path.resolve() for path in expand_paths(source.path)}:
            raise ValueError(f"source {source.name}: {source.path} lies in --output {folder} under a name that the mix "
                             "writes; a mix must not replace its own sources; give another --output")
    items = read_items(config["exclude"], args.skip_bad) if "exclude" in config else Contamination()
    if not items.places:
        print('evaluation items are not looked for; "exclude" in the config names their files')
    counts, outputs = {source.name: Counter() for source in sources}, Outputs(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".mix") as scratch:
            prints = Fingerprints(scratch, near=config.get("near_duplicates", True))
            with contextlib.closing(prints):
                sizes, contaminated, examples = _fingerprint(prints, items, sources, args.skip_bad, counts)
                salt = document_hash(f"seed {config.get('seed', 42)}")
                copies, heldout = plan(prints, contaminated, sources, sizes, targets, salt, args.global_sample_ratio,
                                       counts)
        _write(outputs, sources, args.skip_bad, sizes, copies, heldout, counts)
        outputs.commit()
    finally:
        outputs.discard()
    asked = {category: targets[category] for category, own in config.get("targets", {}).items() if sizes_itself(own)}
    warnings = list(_warnings(sources, asked, counts, examples, args.global_sample_ratio, folder, outputs.facts))
    stats = {"config": config, "global_sample_ratio": args.global_sample_ratio, "targets": targets,
             "sources": {source.name: {"category": source.category, **counts[source.name]} for source in sources},
             "evaluation texts": len(items.places), "contamination": examples, "files": outputs.facts,
             "warnings": warnings}
    temporary = folder / "dataset_stats.json.tmp"
    temporary.write_bytes(json_line(stats, indent=1))
    os.replace(temporary, folder / "dataset_stats.json")
    print_mix(stats, folder)
    return stats


def print_mix(stats, folder):
    """Print what went in and out of a mix."""
    columns = ("read", "train", "heldout", "different rows")
    rows = [[name, found["category"], *(found.get(column, 0) for column in columns),
             ", ".join(f"{count} {reason}" for reason, count in found.items()
                       if reason not in ("category", *columns) and count)]
            for name, found in stats["sources"].items()]
    print(logs.table(["source", "category", *columns, "left out"], rows))
    for name, facts in stats["files"].items():
        print(f"{folder / name}: {facts['rows']} rows, {facts['bytes'] / 1e6:.2f} MB")
    for warning in stats["warnings"]:
        print(f"warning: {warning}")


# ---------------------------------------------------------------------------------------------------------------------
# 3. inspect


def _quantiles(values):
    """"10% 50% 90% max" of an array of lengths, as a line."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"10% {low:.0f}   50% {middle:.0f}   90% {high:.0f}   longest {max(values)}   mean {np.mean(values):.0f}"


def token_counts(tokenizer, row):
    """(tokens, trained tokens) of a standard row: all of a document but its first, in conversations the answers."""
    if "text" in row:
        count = len(tokenizer.encode(row["text"]))
        return count + 1, count
    masks = [tokenizer.render(turns)[1] for turns in turns_of(row)]
    if "prompt" in row:
        # of a pair only the two compared answers count, not those of earlier turns
        start = len(tokenizer.render(preference(row)[0], add_generation_prompt=True)[1])
        return sum(map(len, masks)), sum(sum(mask[start:]) for mask in masks)
    return len(masks[0]), sum(masks[0])


def inspect(args):
    """Print what is in the files; returns the facts."""
    source = Source("files", "inspected", args.files, _parse_map(args.map))
    tokenizer = Tokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
    items = read_items(args.against, args.skip_bad) if args.against else None
    counts, bad, samples, shared = Counter(), [], [], []
    stages, languages, names = Counter(), Counter(), Counter()
    lengths, tokens, trained = array("q"), array("q"), 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.closing(Fingerprints(scratch)) as prints:
        for stage, row, text, where in source_rows(source, args.skip_bad, counts, bad):
            _add(prints, stage, row, text)
            if items and (found := items.find(parts_of(row), parts_of(row, ["user"]))):
                shared.append("{row} has the {kind} as {item}: {text!r}".format(row=where, **found))
            stages[stage] += 1
            languages[language(text)] += 1
            names[row.get("source", "not named")] += 1
            lengths.append(len(text))
            if tokenizer:
                length, count = token_counts(tokenizer, row)
                tokens.append(length)
                trained += count
            # the rows of the smallest hashes: spread over the file, and the same ones each time
            samples = sorted([*samples, (document_hash(text), prints.count, row)],
                             key=lambda sample: sample[:2])[:args.samples]
        exact, near = (int(found.sum()) for found in prints.duplicates())
    counts["bad"] = len(bad)
    facts = {"rows": len(lengths), "stages": dict(stages),
             "left out": {reason: count for reason, count in counts.items() if reason != "read" and count},
             "languages": dict(languages), "sources": dict(names.most_common(10)), "exact duplicates": exact,
             "near duplicates": near, "characters": sum(lengths)}
    if items:
        facts |= {"contaminated": len(shared), "contaminated share": len(shared) / max(1, len(lengths))}
    if tokens:
        facts |= {"tokens": sum(tokens), "trained tokens": trained, "trained share": trained / sum(tokens)}
    for name, value in facts.items():
        print(f"{name:>18}  {value}")
    if lengths:
        print(f"{'characters a row':>18}  {_quantiles(lengths)}")
    if tokens:
        print(f"{'tokens a row':>18}  {_quantiles(tokens)}")
    for message in bad[:3]:
        print(f"{'bad':>18}  {message}")
    for message in shared[:3]:
        print(f"{'contaminated':>18}  {message}")
    for _, number, row in samples:
        shown = json.dumps(row, ensure_ascii=False, indent=1)[:1500]
        # lone surrogates, which no terminal takes, become question marks
        print(f"\nrow {number}\n{shown.encode('utf-8', 'replace').decode()}")
    return facts


def _parse_map(words):
    """["prompt=question", ...] -> {"prompt": "question"}."""
    pairs = [word.split("=", 1) for word in words]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"--map {'='.join(pair)}; a map is made of field=column; write --map prompt=question "
                             "completion=answer")
    return dict(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# 4. download


def as_lines(path):
    """Write a benchmark's parquet beside it as .jsonl, or as .txt where the rows are the lines of one text (WikiText):
    scores are computed without pyarrow. Where it is missing now, that is said."""
    if path.with_suffix(".jsonl").exists() or path.with_suffix(".txt").exists():
        return
    temporary, one_text = path.with_suffix(".tmp"), True
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for row, _ in read_rows(path):
                one_text = one_text and list(row) == ["text"]
                file.write(row["text"] if one_text else json.dumps(row, ensure_ascii=False) + "\n")
    except ValueError as error:
        temporary.unlink()
        print(f"{path} is not converted: {error}")
        return
    target = path.with_suffix(".txt" if one_text else ".jsonl")
    os.replace(temporary, target)
    print(f"{target}: the same rows")


def download(args):
    """Fetch public sets into --output/NAME; without a name, list them. Returns {name: paths}."""
    if not args.names:
        print(logs.table(["name", "megabytes", "licence", "from"], [
            [name, sum(public.files.values()) + public.shard_mb or "not known", public.licence,
             public.repo.removeprefix(GITHUB)] for name, public in SETS.items()]))
        print("\n".join(f"{group}: {', '.join(names)}" for group, names in GROUPS.items()))
        return {}
    names = [each for name in args.names for each in GROUPS.get(name, (name,))]
    if unknown := [name for name in names if name not in SETS]:
        raise ValueError(f"download {unknown[0]}: no set of that name; there are {', '.join([*SETS, *GROUPS])}; list "
                         "them with sizes and licences: python prepare_data.py download")
    mirrors, done = mirror_list(args.mirror), {}
    for name in names:
        done[name] = get_set(name, args.output, mirrors, args.shards)
        for path in done[name]:
            if path.suffix == ".parquet" and name in GROUPS["eval"]:
                as_lines(path)
    return done


# ---------------------------------------------------------------------------------------------------------------------
# 5. export


def _settle_format(args):
    """Fill in --format and --max_length where they are not given. Raises ValueError for flags that do not go
    together: one of them would be ignored in silence."""
    named = Path(args.output).suffix[1:]
    if args.format and named in FORMATS and named != args.format:
        raise ValueError(f"--output {args.output} with --format {args.format}; the ending of a file says what is in "
                         "it; leave --format out, or give another --output")
    args.format = args.format or (named if named in FORMATS else "npz")
    if args.format == "jsonl":
        given = {"--tokenizer": args.tokenizer, "--max_length": args.max_length, "--add_bos 0": not args.add_bos,
                 "--add_eos 1": args.add_eos}
        if useless := [flag for flag, value in given.items() if value]:
            raise ValueError(f"{', '.join(useless)} with jsonl; rows are written as they are, without tokens; leave "
                             f"{'it' if len(useless) == 1 else 'them'} out, or give --format npz")
    args.max_length = args.max_length or 2048


def export(args):
    """Write tensors of a stage for other programs, or rows of any stage as lines; returns the counts."""
    _settle_format(args)
    path = Path(args.output or f"out/export/{args.stage or 'rows'}.{args.format}")
    if path.is_dir() or path.resolve() in [source.resolve() for source in expand_paths(args.data_path)]:
        raise ValueError(f"--output {path} is {'a folder' if path.is_dir() else 'in --data_path as well'}; an export "
                         "writes a file and replaces none of its sources; give another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "jsonl":
        return export_lines(args, path)
    if not args.stage or not args.tokenizer:
        raise ValueError(f"export to {args.format}: --stage {args.stage or 'missing'}, --tokenizer "
                         f"{args.tokenizer or 'missing'}; tensors need both; give them, or --format jsonl for the rows")
    if args.add_eos and args.stage != "pretrain":
        raise ValueError(f"--add_eos 1 with --stage {args.stage}; every answer of a conversation has its end token "
                         "already; leave --add_eos out")
    kind = {"pretrain": dataset.PretrainData, "sft": dataset.SFTData, "dpo": dataset.PreferenceData}[args.stage]
    tokenizer, mapping = Tokenizer.from_pretrained(args.tokenizer), _parse_map(args.map)

    class Renamed(kind):
        """The data set of the stage on rows whose columns have other names."""

        def parse(self, row, where):
            return super().parse(rename(row, mapping, where), where)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as scratch:
        scratch = Path(scratch)
        # where the first token goes, one more of the text fits
        length = args.max_length + tensors.loses_first(kind.kind, tokenizer, args.add_bos)
        try:
            data = Renamed(args.data_path, tokenizer, length, scratch / "cache", skip_bad=args.skip_bad)
        except ValueError as error:  # data sets speak of the flag of training
            raise ValueError(str(error).replace("max_seq_len", "max_length")) from None
        arrays = tensors.fill(data, args.add_bos, args.add_eos, scratch)
        tensors.save(arrays, scratch, path, args.format)
        facts = {"rows": len(next(iter(arrays.values()))), "shapes": {name: x.shape for name, x in arrays.items()},
                 "tokens": int(sum(x.sum() for name, x in arrays.items() if name.endswith("lengths"))),
                 "trained": int(sum(x.sum() for name, x in arrays.items() if name.endswith("loss_mask"))),
                 **{key: data.stats[key] for key in ("truncated", "dropped", "reasons", "bad")}}
        del arrays  # mapped files cannot be deleted everywhere
    print(f"{path}: {', '.join(f'{name} {list(shape)}' for name, shape in facts['shapes'].items())}; "
          f"{facts['trained']} of {facts['tokens']} tokens are trained")
    if facts["truncated"] or facts["dropped"]:
        print(f"warning: {facts['truncated']} rows were longer than {args.max_length} tokens and are cut, "
              f"{facts['dropped']} left out{''.join(f' ({count} {why})' for why, count in facts['reasons'].items())}; "
              "raise --max_length to keep them whole")
    return facts


def export_lines(args, path):
    """Write the rows in the form in which training reads them as .jsonl, for programs that take no other file;
    returns the counts."""
    source, counts, bad = Source("rows", "rows", args.data_path, _parse_map(args.map)), Counter(), []
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for stage, row, _, where in source_rows(source, args.skip_bad, counts, bad):
                if args.stage not in ("", {"preference": "dpo"}.get(stage, stage)):
                    raise ValueError(f"{where}: found a row for {stage}; --stage {args.stage} takes no other; leave "
                                     "--stage out to write all rows")
                file.write(json_line(row))
                counts["written"] += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    counts["bad"] = len(bad)
    print(f"{path}: {', '.join(f'{count} {name}' for name, count in counts.items() if count)}")
    return dict(counts)


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command


def parse_args(argv=None):
    """Flags of the four commands."""
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{mix,inspect,download,export}")

    def command(name, text):
        sub = commands.add_parser(name, description=text, help=text)
        cli.switch(sub, "--debug", 0, "show the traceback of an error")
        return sub

    def reading(sub):
        sub.add_argument("--map", nargs="+", default=[], metavar="FIELD=COLUMN",
                         help="columns of files whose fields have other names: --map prompt=question completion=answer")
        cli.switch(sub, "--skip_bad", 0, "skip and count unreadable lines and rows instead of stopping at the first")

    sub = command("mix", "mix sources by category into files for every stage")
    sub.add_argument("--config", required=True, help="JSON file with sources and targets (docs/data.md)")
    sub.add_argument("--output", default="out/mix", help="folder for the files and dataset_stats.json")
    sub.add_argument("--global_sample_ratio", type=cli.positive(float), default=1.0,
                     help="scales the rows wanted of every category; 0.01 for a trial")
    cli.switch(sub, "--skip_bad", 0, "skip and count unreadable lines and rows instead of stopping at the first")
    sub = command("inspect", "show lengths, languages, duplicates, samples and the trained share of files")
    sub.add_argument("files", nargs="+", help="files or globs")
    sub.add_argument("--tokenizer", default="", help="folder of a tokenizer or checkpoint, to count tokens")
    sub.add_argument("--samples", type=cli.positive(int, zero=True), default=3, help="rows to print")
    sub.add_argument("--against", nargs="+", default=[], metavar="FILE",
                     help="evaluation files (or globs): rows in which one of their questions stands are counted")
    reading(sub)
    sub = command("download", "fetch public sets by name; without one, list them with sizes and licences")
    sub.add_argument("names", nargs="*", help=f"sets, or groups of them: {', '.join([*GROUPS, *SETS])}")
    sub.add_argument("--output", default="out/downloads", help="folder; every set gets one of its name in it")
    sub.add_argument("--mirror", nargs="+", default=[],
                     help=f"where to ask, in this order: {', '.join(MIRRORS)}, or the address of another mirror of the "
                          "hub (left out: HF_ENDPOINT where it is set, then all)")
    sub.add_argument("--shards", type=cli.positive(int), default=1, help="how many of the files of a set in shards")
    sub = command("export", "write tensors of a stage, or rows as .jsonl, for other programs")
    sub.add_argument("--stage", default="", choices=("pretrain", "sft", "dpo"),
                     help="what the rows are read as (left out: rows of any stage, with --format jsonl only)")
    sub.add_argument("--data_path", nargs="+", required=True, help="files or globs")
    sub.add_argument("--tokenizer", default="", help="folder of a tokenizer or checkpoint, for npz and pt")
    sub.add_argument("--format", default="", choices=FORMATS,
                     help="numpy archive, torch.save of a dict, or the rows themselves, not as tokens (left out: the "
                          "ending of --output, else npz)")
    sub.add_argument("--output", default="", help="file to write (left out: out/export/STAGE.FORMAT)")
    sub.add_argument("--max_length", type=cli.positive(int),
                     help="tokens of a row; longer ones are cut (left out: 2048)")
    cli.switch(sub, "--add_bos", 1, "begin every row with the tokenizer's first token, where it has one")
    cli.switch(sub, "--add_eos", 0, "pretrain: end every document that is not cut with the end token")
    reading(sub)
    return parser.parse_args(argv)


def main(args):
    """Run one command. Returns its facts."""
    return {"mix": mix, "inspect": inspect, "download": download, "export": export}[args.command](args)


if __name__ == "__main__":
    common.run(main, parse_args)

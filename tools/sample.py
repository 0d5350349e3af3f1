"""Text from an artifact: `./run.sh sample RUN ["a prompt"] [TEMPERATURE=0.8] [TOP_K=40] [SEED=1] [LENGTH=200]`.

RUN is a run id, or the path of a log or a .bin. The model goes on after the prompt, or begins a document: LENGTH ids,
each from the TOP_K likeliest (0: all) by the softmax of the soft-capped logits over TEMPERATURE (0: the likeliest). The
same SEED gives the same text. The run's log says where its tokenizer lies, TOKENIZER_PATH=file where it now lies.
"""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import foreign, knobs
from tools.common import ToolError, program
from tools.logs import events, find_log, last, log_folder, pairs

OPTIONS = {"TEMPERATURE": float, "TOP_K": int, "SEED": int, "LENGTH": int}


def find(run: str, env: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """(artifact of a run, knobs: of its log all but the group Run, over them `env`). Raises `ToolError`."""
    path = Path(run)
    log = path.with_suffix(".jsonl") if path.suffix == ".bin" and path.is_file() else find_log(run, log_folder(env))
    artifact = log.with_suffix(".bin")
    if not artifact.is_file():
        raise ToolError(f"{artifact}: no such artifact; expected a run that has finished, or the path of a .bin")
    config = last(events(log), "config") or {} if log.is_file() else {}
    logged = {knob.name: knobs.typed_text(config[knob.name.lower()]) for knob in knobs.read()
              if knob.name.lower() in config and not knob.group.startswith("Run:")}
    return artifact, {**logged, **env}


def restored(word: str, transform: Any) -> str:
    """A word with capitals for case operators, and without what would move a terminal's cursor."""
    try:
        word = transform.decode(word)
    except ValueError:  # the model may put an operator where none belongs
        word = "".join(c for c in word if c not in transform.operators)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", word)


class Writer:
    """The model of an artifact, which goes on with texts."""

    def __init__(self, artifact: Path, env: Mapping[str, str]):
        """`env`: knobs that say where the data lie. Raises `ToolError` and the trainer's `UserError`."""
        import train_gpt as tg
        from data.caseops import TRANSFORMS
        tg.torch.set_num_threads(1)  # one id at a time is little work: on busy cores two take five times as long
        found = tg.unpack(artifact.read_bytes(), str(artifact))
        data = "" if env.get("TOKENIZER_PATH") else found.validation  # only its tokenizer is of interest
        self.tg, self.cfg = tg, tg.on_its_data(tg.Config.from_env(env, found.knobs), data, env)
        self.run, path = tg.Run(self.cfg, {}, log=False), tg.tokenizer_path(self.cfg)
        self.sp = tg.load_sentencepiece(path, self.cfg.vocab_size)
        name = str(tg.manifest(self.cfg.dataset_dir).get("transform", "none"))
        if name not in TRANSFORMS or self.cfg.caseops_enabled and name == "none":
            raise ToolError(f"{self.cfg.dataset_dir}/manifest.json: transform={name}: which case operators the run had "
                            f"({', '.join(TRANSFORMS)}) is not known; set DATA_PATH to the folder of its shards")
        self.transform, self.model = TRANSFORMS[name], tg.GPT(found.model).to(self.run.device).requires_grad_(False)
        tg.load_tensors(self.model, found.tensors)
        self.weights, self.layers = tg.Weights(self.model, self.run.dtype), tg.unroll_layers(self.cfg, looped=True)

    def shares(self, ids: Sequence[int], cache: Any, temperature: float, top_k: int) -> Any:
        """[V] float64: probability of each id after a document's `ids`, of which `cache` has all but the last few."""
        torch, device, softcap = self.tg.torch, self.run.device, self.cfg.logit_softcap
        window = torch.tensor([[self.tg.BOS_ID, *ids][cache.length:]], device=device)  # and the id before these
        positions = torch.arange(cache.length - 1, len(ids), device=device)[None]
        hidden = self.model(self.tg.Batch(window, window, positions, None), self.layers, self.weights, cache)[0, -1]
        cache.advance(len(ids) - cache.length)
        logits = softcap * (self.weights.linear("head", None, hidden).double().cpu() / softcap).tanh()
        values, kept = logits.topk(1 if temperature == 0 else min(top_k or len(logits), len(logits)))
        return torch.zeros_like(logits).scatter(0, kept, ((values - values[0]) / (temperature or 1.0)).softmax(0))

    def text(self, prompt: str = "", temperature: float = 0.8, top_k: int = 40, seed: int = 1, length: int = 200
             ) -> Iterator[str]:
        """The prompt as the tokenizer has it, then what `length` ids after it say, word by word as they are drawn."""
        dice, between, shown = self.tg.torch.Generator().manual_seed(seed), r"\s" + self.transform.operators, 0
        ids = [self.tg.BOS_ID, *self.sp.encode(self.transform.encode(prompt.encode("utf-8", "replace").decode()))]
        cache, end = self.tg.KeyValueCache(self.cfg.eval_seq_len), len(ids) + length
        while True:
            words = re.split(f"(?<![{between}])(?=[{between}])", self.sp.decode(ids[1:]))  # operators begin a word
            yield from (restored(word, self.transform) for word in words[shown:-1])
            shown = len(words) - 1
            while cache.length < len(ids):  # a long prompt in parts
                shares = self.shares(ids[:cache.length + self.cfg.eval_seq_len], cache, temperature, top_k)
            drawn = int(shares.multinomial(1, generator=dice))
            if drawn == self.tg.BOS_ID or len(ids) == end:
                break
            ids.append(drawn)
        yield restored(words[-1].rstrip("\ufffd"), self.transform)  # without half a character


def samples(artifact: Path, prompts: Sequence[str] = ("import", "def"), characters: int = 150) -> list[str]:
    """What the model writes after these beginnings of documents, cut to so many characters. Raises as `Writer` does."""
    writer = Writer(*find(str(artifact), os.environ))
    return ["".join(writer.text(prompt, length=characters // 2))[:characters] for prompt in prompts]


def main(arguments: Sequence[str]) -> None:
    """Print the text while it is drawn."""
    if not arguments:
        raise ToolError('expected RUN ["a prompt"] [TEMPERATURE=0.8] [TOP_K=40] [SEED=1] [LENGTH=200]')
    prompt = [argument for argument in arguments[1:] if not re.match("[A-Z][A-Z0-9_]*=", argument)]
    if len(prompt) > 1:
        raise ToolError(f"{prompt[1]}: expected one prompt, in quotes, and options such as TEMPERATURE=0.8")
    given = pairs([argument for argument in arguments[1:] if argument not in prompt])
    for name in OPTIONS.keys() & given:
        if not re.fullmatch(r"\d{1,9}" + r"(\.\d*)?" * (OPTIONS[name] is float), given[name]):
            raise ToolError(f"{name}={given[name]}: expected a {'whole ' * (OPTIONS[name] is int)}number, 0 or more")
    options = {name.lower(): kind(given.pop(name)) for name, kind in OPTIONS.items() if name in given}
    foreign.check_typed(given, {*OPTIONS, *(knob.name for knob in knobs.read())})
    for word in Writer(*find(arguments[0], {**os.environ, **given})).text(*prompt, **options):
        print(word, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(program(main, "sample", __doc__))

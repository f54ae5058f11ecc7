"""TRL's side of a comparison (for `generate`: that of transformers). Runs in an environment with trl and peft.

Its own trainers, told to take the rows in order, with the settings of our side: AdamW without decay, constant rate,
gradient norm 1, no dropout, no gradient checkpointing (TRL's default is on, which is slower and smaller).
"""

import json
import sys
from pathlib import Path

import side

plan = json.loads(Path(sys.argv[1]).read_text())
parent = side.Parent(plan)

import torch  # noqa: E402

torch.set_num_threads(plan["threads"])

from datasets import Dataset  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

work, lora, bf16 = plan["work"], plan["lora_rank"], plan["dtype"] == "bfloat16"
weights = torch.bfloat16 if bf16 and (lora or work == "generate") else torch.float32  # trained weights stay float32
tokenizer = AutoTokenizer.from_pretrained(plan["model"])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=weights)
steps = len(plan["rows"]) // plan["batch"]
common = {
    "output_dir": plan["folder"],
    "max_steps": steps,
    "per_device_train_batch_size": plan["batch"],
    "learning_rate": plan["lr"],
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "bf16": bf16,
    "use_cpu": plan["device"] == "cpu",
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def peft_config():
    if not lora:
        return None
    from peft import LoraConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=lora, lora_alpha=2 * lora, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")


class Steps(TrainerCallback):
    """Waits for the parent before each step and reports after it."""

    def __init__(self):
        self.told = {}

    def on_step_begin(self, args, state, control, **kwargs):
        parent.wait(**self.told)

    def on_step_end(self, args, state, control, **kwargs):
        parent.stop()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.told = {"loss": logs["loss"]}

    def on_train_end(self, args, state, control, **kwargs):
        parent.wait(**self.told)


def in_order(trainer_class):
    class InOrder(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    return InOrder


def sft():
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": row["prompt"] + row["chosen"],
            "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["chosen"]),
        }
        for row in plan["rows"]
    ]
    in_order(SFTTrainer)(
        model=model,
        args=SFTConfig(**common, max_length=None, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Steps()],
        peft_config=peft_config(),
    ).train()


def dpo():
    from trl import DPOConfig, DPOTrainer

    class Tokenised(in_order(DPOTrainer)):
        def _prepare_dataset(self, dataset, *args):  # the rows are token ids already
            return dataset

    rows = [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in plan["rows"]]
    Tokenised(
        model=model,
        args=DPOConfig(**common, max_length=None, beta=0.1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Steps()],
        peft_config=peft_config(),
    ).train()


def ppo():
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    value = AutoModelForSequenceClassification.from_pretrained(plan["model"], num_labels=1, dtype=weights)
    if lora:  # TRL would train every weight of the critic
        from peft import inject_adapter_in_model

        inject_adapter_in_model(peft_config(), value)
        value.score.requires_grad_(True)
    # A reward that costs nothing: one layer of width 8.
    small = AutoConfig.from_pretrained(plan["model"])
    small.update({"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_labels": 1})
    small.update({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8})
    reward = AutoModelForSequenceClassification.from_config(small)
    for part in (value, reward):
        part.config.pad_token_id = tokenizer.pad_token_id
    part = plan["batch"] // plan["minibatches"]
    settings = {**common, "per_device_train_batch_size": part, "gradient_accumulation_steps": plan["minibatches"]}
    del settings["max_steps"], settings["logging_steps"]

    class Iterations(Steps):
        def on_train_begin(self, *args, **kwargs):
            parent.wait()

        def on_step_begin(self, *args, **kwargs):
            pass

        def on_step_end(self, args, state, control, **kwargs):
            parent.stop()
            if state.global_step < steps:
                parent.wait()

    PPOTrainer(
        args=PPOConfig(
            **settings,
            total_episodes=len(plan["rows"]),
            num_mini_batches=plan["minibatches"],
            num_ppo_epochs=plan["epochs"],
            response_length=plan["new_tokens"],
            local_rollout_forward_batch_size=plan["batch"],
            num_sample_generations=0,
            kl_coef=0.05,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=None if lora else AutoModelForCausalLM.from_pretrained(plan["model"], dtype=weights),
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": row["prompt"]} for row in plan["rows"]]),
        callbacks=[Iterations()],
        peft_config=peft_config(),
    ).train()


def generate():
    model.eval().to(plan["device"])
    tokenizer.padding_side = "left"
    for start in range(0, len(plan["rows"]), plan["batch"]):
        parent.wait()
        prompts = [row["prompt"] for row in plan["rows"][start : start + plan["batch"]]]
        encoded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(plan["device"])
        model.generate(
            **encoded,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=plan["samples"],
            max_new_tokens=plan["new_tokens"],
            min_new_tokens=plan["new_tokens"],
        )
    parent.wait()


{"sft": sft, "dpo": dpo, "ppo": ppo, "generate": generate}[work]()

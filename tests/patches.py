"""What a test changes in a script's process before it starts (the `patch` of tests/scripts.py), one function each.

And a reward for train_ppo.py --reward, since an untrained model earns nothing from the scorer.
"""

import os
import resource


def small_disk():
    """No file may grow beyond 20 kB, as if the disk were full: the system then says EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def slow_steps():
    """Every forward pass takes a while, so that a signal comes in the middle of a step."""
    import time

    import socratiq.policy as policy

    original = policy.token_logprobs

    def token_logprobs(*args, **options):
        time.sleep(0.05)
        return original(*args, **options)

    policy.token_logprobs = token_logprobs


def endless_step():
    """The second update never comes to its end."""
    import time

    import socratiq.training as training

    original, calls = training.update, []

    def update(*args, **options):
        calls.append(1)
        if len(calls) > 4:  # PPO updates four times a step
            print("endless", flush=True)
            time.sleep(60)
        return original(*args, **options)

    training.update = update


def endless_loading():
    """Opening the model never comes to its end."""
    import time

    import socratiq.models as model

    def load_policy(*args, **options):
        print("loading", flush=True)
        time.sleep(60)

    model.load_policy = load_policy


def all_end_at_once():
    """Every question of a rollout is empty: the model says it is done and nothing else."""
    import socratiq.sampling as sampling

    def sample(policy, prompts, samples, max_new_tokens, eos_id, temperature, seeds):
        return [[[eos_id] for _ in range(samples)] for _ in prompts]

    sampling.sample = sample


def wordy(contexts, questions, types):
    """The longer the better. Of several processes the first alone may ask: a reward can cost money."""
    assert os.environ.get("RANK", "0") == "0"
    return [len(question) / 100 for question in questions]


def quick_retries():
    """The openai package waits a hundredth of a second before it sends a request again, not half a second."""
    import openai._base_client

    openai._base_client.INITIAL_RETRY_DELAY = 0.01

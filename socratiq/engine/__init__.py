"""The engine: the same numbers as the plain core, faster or on more devices. `--plain` leaves it out.

A policy has `twins`, a table from a plain function or class of the core to a faster one; layers of a known kind get a
faster `forward`. bench/RESULTS.md, "Rent of the engine", says what each piece gives.
"""


def speed_up(policy, device) -> None:
    """Put into a policy the twins for the torch.device on which it is, or will be once it is shared out."""
    import types

    import torch

    from socratiq.batch import RowAttention
    from socratiq.engine import attention, cache, fused, head, packed, padding
    from socratiq.policy import head_logprobs
    from socratiq.sampling import Cache, generate

    fused.fuse(policy.lm)
    policy.twins[head_logprobs] = head.in_chunks
    if device.type == "cpu":
        policy.twins |= {RowAttention: attention.ShortRows, generate: packed.generate}
        if policy.autocast:
            policy.hidden = types.MethodType(padding.padded_hidden, policy)
    else:
        policy.twins |= {RowAttention: attention.RowsAtOnce, Cache: cache.StaticCache}
        # cuDNN plans its attention anew for every new length, which takes 0.1 s and more each time.
        torch.backends.cuda.enable_cudnn_sdp(False)

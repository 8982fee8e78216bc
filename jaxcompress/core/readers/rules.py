"""The table of rules: which function handles which primitive."""

from __future__ import annotations

from jaxcompress.core.readers import calls, control_flow, custom_rules, unofficial
from jaxcompress.core.readers.walk import Rule

RULES: dict[str, Rule] = {
    "scan": control_flow.scan,
    "while": control_flow.while_loop,
    "cond": control_flow.cond,
    "shard_map": calls.shard_map,
    "custom_vmap_call": calls.custom_vmap,
    "custom_jvp_call": custom_rules.custom_jvp,
    "custom_vjp_call": custom_rules.custom_vjp,
    **dict.fromkeys(unofficial.JIT, calls.jit),
    **dict.fromkeys(unofficial.REMAT, calls.remat),
    **dict.fromkeys(unofficial.CALL, calls.call),
}

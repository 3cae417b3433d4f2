"""The fast path: the same network, computed sooner. `docs/performance-history.md` has what each part brought.

Nothing here is a second network. Modules of the given network get another `forward`, which reads the parameters that
are there, adapters included, and can be taken off again (`fast=False` gives the plain path); what is compiled or
recorded is traced from that network and compared with it before it is believed. From the bottom up:

1. The batch as tables of one width, so that no shape or decision depends on what is in it: `arrangement`.
2. Exact replacements of mace's parts, put on and taken off by `switch`: `contraction`, `convolution`,
   `self_connection`, `piecewise`, `pair_radial` with `radial_table`, `head_mask`. Sums are written out for them by
   `polynomials` and `harmonics`.
3. Gates for inference: tables by element (`element_tables`), the others in few operations (`frozen_gates`).
4. Network and derivatives as one graph for batches of any size (`tracing`), compiled and kept (`machine_code`).
5. Calls (`compiled`): a program is found or made, proven, and fed, on a CPU in parts that its cache holds (`parts`);
   memory is kept for the next one (`memory`).
6. On a GPU, what is done again and again is recorded as a CUDA graph (`recorded`): calls (`recorded_call`) and
   optimisers (`recorded_change`), with neighbour lists made there (`pairs_on_device`), edges in tables whose shape
   stays (`full_table`) and tensors that stay where they are (`fixed_network`).
7. On a GPU, cuEquivariance's layers instead: an extra (`converted`).

`tensor_state` says whether what was kept is still true of the tensors that it was made of. Steps of training are
compiled in `training/compiled_training`, steps of dynamics recorded in `md/blocks`.
"""

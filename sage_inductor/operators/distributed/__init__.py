"""The operators given DTensors: which shards each rank computes, and rings where torch's context parallelism asks for them.

Imports torch.distributed.tensor. `sage_inductor.operators.sharded` says when."""

"""A model over many GPUs [V3 sections 3.2 and 3.4].

In the order of reading: mesh (which rank holds what), peers (collectives over processes or threads), dispatch and two_hop
(how tokens travel), experts (a model's experts spread over ranks), zero and step (a training step of many ranks),
expert_pipeline (the same with pipelines: V3's layout whole), checkpoint and train. check and timing ask real processes.
nodes and planner say what it costs before anyone buys it. eplb, packing and loads place experts in service.
"""

"""P-tuning: what the laws and the comparison with PEFT try of it.

A file holds what the network computes. PEFT sets it into a model in training as the network's
input, and so computes something else: `set_peft_model_state_dict` here trains the table on.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"num_virtual_tokens": 3}, {"num_virtual_tokens": 2, "encoder_hidden_size": 5}]
PEFT = {
    "decoder": (
        llama,
        {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "encoder_hidden_size": 7},
    ),
    "an LSTM": (
        gpt2,
        {
            "num_virtual_tokens": 4,
            "task_type": "CAUSAL_LM",
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 1,
            "encoder_hidden_size": 6,
        },
    ),
    "encoder with a head": (bert, {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}),
    "encoder-decoder, an LSTM": (
        t5,
        {
            "num_virtual_tokens": 3,
            "task_type": "SEQ_2_SEQ_LM",
            "encoder_reparameterization_type": "LSTM",
            "encoder_dropout": 0.2,
        },
    ),
}

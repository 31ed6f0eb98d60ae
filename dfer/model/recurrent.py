"""Recurrent networks over the frames of a clip, which can be exported for any number of frames."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._higher_order_ops import scan


def last_state(rnn: nn.GRU | nn.LSTM, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H"]:
    """Return the hidden state of a recurrent network after the last frame.

    torch.export unrolls nn.GRU and nn.LSTM over the frames of the example, which fixes T. While it traces, the same
    steps are written as torch's scan operator instead, which keeps T free and which ONNX has too. Scan is a prototype
    and has less speed, so training and evaluation never take it.

    Args:
        rnn: of one layer and one direction, with biases and `batch_first`.
        x: features of the frames, in order.
    """
    assert rnn.batch_first and rnn.bias and rnn.num_layers == 1 and not rnn.bidirectional and not rnn.proj_size
    if not torch.compiler.is_exporting():
        return rnn(x)[0][:, -1]
    input_weight, weight, input_bias, bias = rnn.all_weights[0]
    inputs = F.linear(x, input_weight, input_bias).transpose(0, 1)  # (T, B, gates * H)
    hidden = x.new_zeros(x.shape[0], rnn.hidden_size)

    def gru_step(hidden: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        reset, update, new = given.chunk(3, -1)
        reset_h, update_h, new_h = F.linear(hidden, weight, bias).chunk(3, -1)
        new = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
        hidden = new + torch.sigmoid(update + update_h) * (hidden - new)
        return hidden, hidden.clone()  # scan's outputs must not be the same tensor

    def lstm_step(state: tuple[Tensor, Tensor], given: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        hidden, cell = state
        input_gate, forget, new, output = (given + F.linear(hidden, weight, bias)).chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(input_gate) * torch.tanh(new)
        hidden = torch.sigmoid(output) * torch.tanh(cell)
        return (hidden, cell), hidden.clone()

    if isinstance(rnn, nn.GRU):
        return scan(gru_step, hidden, inputs)[0]
    return scan(lstm_step, (hidden, torch.zeros_like(hidden)), inputs)[0][0]

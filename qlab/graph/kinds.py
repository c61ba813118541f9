"""The kind of a layer: one word for what it computes, whether it was written as a module or as a function.

Placement rules, patterns and views speak of kinds. Kinds not listed here keep their own name ('erf', 'cumsum', ...).
"""

from torch import nn

MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
    nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose",
    nn.ConvTranspose3d: "conv_transpose",
    nn.Linear: "linear",
    nn.Bilinear: "bilinear",
    nn.Embedding: "embedding",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
    nn.InstanceNorm1d: "instance_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.InstanceNorm3d: "instance_norm",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "clip",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softmax: "softmax",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.MaxPool1d: "max_pool",
    nn.MaxPool2d: "max_pool",
    nn.MaxPool3d: "max_pool",
    nn.AdaptiveMaxPool1d: "max_pool",
    nn.AdaptiveMaxPool2d: "max_pool",
    nn.AvgPool1d: "avg_pool",
    nn.AvgPool2d: "avg_pool",
    nn.AvgPool3d: "avg_pool",
    nn.AdaptiveAvgPool1d: "avg_pool",
    nn.AdaptiveAvgPool2d: "avg_pool",
    nn.AdaptiveAvgPool3d: "avg_pool",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout",
    nn.Dropout3d: "dropout",
    nn.AlphaDropout: "dropout",
    nn.Identity: "identity",
    nn.Flatten: "reshape",
    nn.Unflatten: "reshape",
    nn.PixelShuffle: "reshape",
    nn.PixelUnshuffle: "reshape",
    nn.ChannelShuffle: "reshape",
    nn.ZeroPad1d: "zero_pad",
    nn.ZeroPad2d: "zero_pad",
    nn.ReflectionPad2d: "zero_pad",
    nn.ReplicationPad2d: "zero_pad",
    nn.Upsample: "interpolate",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
}

# ATen operator names (without overload) to kinds.
FUNCTION_KINDS: dict[str, str] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv_transpose"),
    **dict.fromkeys(("linear", "addmm"), "linear"),
    **dict.fromkeys(("matmul", "bmm", "mm", "einsum", "baddbmm"), "matmul"),
    **dict.fromkeys(("add", "add_", "__add__"), "add"),
    **dict.fromkeys(("sub", "rsub"), "sub"),
    **dict.fromkeys(("cat", "concat", "stack", "hstack", "vstack"), "cat"),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), "batch_norm"),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), "layer_norm"),
    **dict.fromkeys(("softmax", "_softmax"), "softmax"),
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys(("hardtanh", "clamp", "clamp_min", "clamp_max", "clip"), "clip"),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d"), "max_pool"),
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        "avg_pool",
    ),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), "reshape"),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "im2col"), "reshape"),
    **dict.fromkeys(("transpose", "permute", "t", "movedim", "swapaxes", "numpy_T"), "transpose"),
    **dict.fromkeys(("slice", "select", "narrow", "index", "index_select", "gather", "roll", "flip"), "slice"),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "tensor_split"), "split"),
    **dict.fromkeys(("expand", "expand_as", "repeat", "repeat_interleave", "tile"), "expand"),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh_copy"), "identity"),
    **dict.fromkeys(("dropout", "native_dropout", "feature_dropout"), "dropout"),
    **dict.fromkeys(("to", "_to_copy", "type_as"), "cast"),
    **dict.fromkeys(("masked_fill", "where"), "mask"),
    **dict.fromkeys(("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d"), "zero_pad"),
    **dict.fromkeys(("amax", "max", "amin", "min"), "max"),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), "upsample_nearest"),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "interpolate"), "interpolate"),
    "scaled_dot_product_attention": "attention",
    "sym_size": "size",
    "getitem": "getitem",
    "lstm": "lstm",
    "gru": "gru",
    "embedding": "embedding",
}

WEIGHTED = frozenset({"conv", "conv_transpose", "linear", "embedding", "matmul", "bilinear"})
"""Kinds whose parameter operand is a weight: it gets a weight quantizer."""

SAME_GRID = frozenset(
    {"reshape", "transpose", "slice", "split", "getitem", "expand", "identity", "dropout", "cast", "max_pool", "max"}
    | {"zero_pad", "mask", "relu", "upsample_nearest"}
)
"""Kinds whose output values are input values (or zero): they lie on the input's grid without an own quantizer."""

KNOWN_RANGES: dict[str, tuple[float, float]] = {
    "softmax": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
}
"""Kinds whose range is known without data."""


def kind_of(module: nn.Module | None, function: object) -> str:
    """The kind of a call of `module`, or of the function where there is no module."""
    if module is not None:
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and is_depthwise(module):
            return "depthwise_conv"
        for base in type(module).__mro__:
            if base in MODULE_KINDS:
                return MODULE_KINDS[base]
        return type(module).__name__.lower()
    name = getattr(function, "__name__", str(function)).split(".")[0]
    return FUNCTION_KINDS.get(name, name)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution has one input channel a group and more than one group."""
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", None)

"""Operations of torch that are linear (or affine) in what depends on the image: a closed list, shared by methods."""

from __future__ import annotations

from cxrkit.attribution.operations import Call, tensors

__all__ = ["NORMS", "nonlinearity"]

# Jointly linear in all their tensors that depend on the image.
_JOINTLY = {"T", "mT", "H", "mH", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel"}
_JOINTLY |= {"permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze"}
_JOINTLY |= {"expand", "expand_as", "broadcast_to", "broadcast_tensors", "contiguous", "clone", "to", "type"}
_JOINTLY |= {"type_as", "float", "double", "getitem", "select", "narrow", "chunk", "split", "tensor_split", "unbind"}
_JOINTLY |= {"unfold", "fold", "index_select", "gather", "take_along_dim", "repeat", "tile", "repeat_interleave"}
_JOINTLY |= {"flip", "fliplr", "flipud", "roll", "rot90", "pad", "cat", "stack", "hstack", "vstack", "dstack"}
_JOINTLY |= {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "diagonal", "tril"}
_JOINTLY |= {"triu", "masked_fill", "where", "real", "imag", "view_as_real", "view_as_complex", "add", "sub", "rsub"}
_JOINTLY |= {"neg", "positive", "sum", "mean", "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d"}
_JOINTLY |= {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample"}
_JOINTLY |= {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"}
_JOINTLY |= {"feature_alpha_dropout"}
# Linear in each of their tensors alone; those that begin with "add" add such a product to their first.
_FACTORS = {"mul", "div", "mm", "bmm", "matmul", "mv", "dot", "inner", "einsum", "tensordot", "linear", "conv1d"}
_FACTORS |= {"conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "addmm", "addbmm"}
_FACTORS |= {"baddbmm", "addmv", "addcmul", "batch_norm", "grid_sample", "fft_fft2", "fft_ifft2", "fft_rfft2"}
_FACTORS |= {"fft_irfft2", "fft_fftshift", "fft_ifftshift"}
_ONLY_IN_FIRST = {"div", "batch_norm", "grid_sample"}
# Norms by the image's own statistics aren't linear; methods that differentiate them as they are may let them pass.
NORMS = {"group_norm", "layer_norm", "instance_norm", "local_response_norm", "rms_norm"}


def nonlinearity(call: Call, args: tuple, kwargs: dict) -> str | None:
    """Why a call isn't known to be linear in what depends on the image, as words behind its name; None where it is."""
    if call.name in _JOINTLY:
        return None
    if call.name not in _FACTORS or kwargs.get("rounding_mode"):
        return ""
    added = call.name in ("addmm", "addbmm", "baddbmm", "addmv", "addcmul")
    factors = [t for t in tensors((*args[added:], *kwargs.values())) if t.requires_grad]
    if len(factors) > 1:
        return "of two tensors that both depend on the image, as in squeeze-and-excitation"
    if call.name in _ONLY_IN_FIRST and factors and factors[0] is not args[0]:
        return "of a constant by a tensor that depends on the image"
    if call.name == "batch_norm" and kwargs.get("training", args[5] if len(args) > 5 else False):
        return "by the statistics of the images themselves"
    return None

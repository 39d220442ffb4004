"""Small floating-point formats by hand: E4M3, E5M2, E5M6, the MX element formats and E8M0 (V3 section 3.3.2).

A format has one sign bit, an exponent field e of E bits and a mantissa field m of M bits; b is its bias. A code means

    e > 0:  (-1)^s * 2^(e - b) * (1 + m / 2^M)      normal: M + 1 significant bits in every binade
    e = 0:  (-1)^s * 2^(1 - b) * (m / 2^M)          subnormal: the spacing of the lowest binade continues down to zero

Formats differ in what the top of the exponent field means. In "ieee" formats (E5M2, E5M6) the highest field is infinity
(m = 0) or NaN. In "nan" formats (E4M3, as OCP defines it) it holds numbers too and only the last code is NaN, which buys
one more binade: 448 instead of 240. In "none" formats (the 4 and 6 bit elements of MX) every code is a number.

Rounding to nearest even is one division and one multiplication by the spacing u of the binade that x lies in:

    u = 2^(max(floor(log2 |x|), 1 - b) - M)        round(x) = u * round_half_even(x / u), clamped to +-max

The code follows from the same integer n = round_half_even(|x| / u): one binade up adds 2^M, a carry out of the mantissa
lands in the exponent by itself. Everything saturates: what is larger than the largest number, infinity too, becomes it.
(A cast in torch does not say the same in all versions: E4M3 gave NaN above 464 and saturates today, E5M2 gives infinity.
So clamp before a cast, as quantize.py does.)

V3 names E5M6 and its 12 bits but not its specials: that it follows IEEE's rules, as E5M2 does, is our choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of at most 16 bits.

    Attributes:
        name: lower case, as in ``fmt="e4m3"``. exponent_bits, mantissa_bits: E and M; bias: b.
        specials: "ieee", "nan" or "none", see above. signed: E8M0 alone has no sign bit.
        dtype: torch's dtype with the same codes, None where torch has none.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "none"
    signed: bool = True
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """Bits a number takes, the sign included."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """The code of the largest finite number."""
        top = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        return top - {"ieee": 1 << self.mantissa_bits, "nan": 1, "none": 0}[self.specials]

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, 2^min_exponent."""
        return (1 - self.bias) if self.mantissa_bits else -self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number's binade, emax in the MX specification."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @property
    def max(self) -> float:
        """The largest finite number."""
        mantissa = self.max_code & ((1 << self.mantissa_bits) - 1)
        return 2.0**self.max_exponent * (1 + mantissa / 2**self.mantissa_bits)

    @property
    def smallest(self) -> float:
        """The smallest number above zero."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a number in the normal range: half a unit in the last place."""
        return 2.0 ** -(self.mantissa_bits + 1)


E4M3 = Format("e4m3", 4, 3, bias=7, specials="nan", dtype=torch.float8_e4m3fn)
E5M2 = Format("e5m2", 5, 2, bias=15, specials="ieee", dtype=torch.float8_e5m2)
E5M6 = Format("e5m6", 5, 6, bias=15, specials="ieee")
E2M3 = Format("e2m3", 2, 3, bias=1)
E3M2 = Format("e3m2", 3, 2, bias=3)
E2M1 = Format("e2m1", 2, 1, bias=1)
# Scales alone: a power of two and no sign, no zero, no mantissa; field 0 is the number 2^-127, the last code is NaN.
E8M0 = Format("e8m0", 8, 0, bias=127, specials="nan", signed=False, dtype=torch.float8_e8m0fnu)
FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2, E5M6, E2M3, E3M2, E2M1, E8M0)}


def as_format(fmt: str | Format) -> Format:
    """The format of that name; a Format passes through. ValueError: no such name."""
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        raise ValueError(f"fmt: got {fmt!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[fmt]


def decode(codes: Tensor, fmt: str | Format) -> Tensor:
    """What each code means, by the formula.

    Args:
        codes: any shape, an integer dtype, 0 to 2^bits - 1.
        fmt: a format or its name.

    Returns:
        float32 of the same shape; NaN and infinity where the code says so.

    Raises:
        TypeError: codes are not integers. ValueError: a code has more bits than the format.
    """
    fmt = as_format(fmt)
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise TypeError(f"codes: got dtype {codes.dtype}, expected an integer dtype")
    codes = codes.long()
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << fmt.bits:
        raise ValueError(f"codes: got {int(codes.min())} to {int(codes.max())}, expected 0 to {(1 << fmt.bits) - 1}")
    magnitude = codes & ((1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1)
    exponent, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    significand = mantissa.double() / 2**fmt.mantissa_bits
    if fmt.mantissa_bits == 0:  # E8M0: field 0 is one more power of two
        value = power_of_two(exponent - fmt.bias)
    else:
        normal = power_of_two(exponent - fmt.bias) * (1 + significand)
        value = torch.where(exponent > 0, normal, 2.0 ** (1 - fmt.bias) * significand)
    if fmt.specials == "ieee":
        value = torch.where(magnitude == fmt.max_code + 1, torch.inf, value)
    if fmt.specials != "none":
        value = torch.where(magnitude > fmt.max_code + (fmt.specials == "ieee"), torch.nan, value)
    return torch.where(codes > magnitude, -value, value).float()


def encode(x: Tensor, fmt: str | Format) -> Tensor:
    """The code of the nearest number of the format: ties to the even code, saturating.

    Args:
        x: any shape, a floating-point dtype. For E8M0 powers of two from 2^-127 to 2^127, since which way to round a
            scale is the caller's decision.
        fmt: a format or its name.

    Returns:
        uint8 of the same shape; int16 for E5M6, whose codes have 12 bits.

    Raises:
        TypeError: x is not float16, bfloat16, float32 or float64.
        ValueError: NaN where the format has none, or no power of two for E8M0.
    """
    fmt = as_format(fmt)
    x = _wide(x)
    if not fmt.signed:
        return _encode_scale(x, fmt)
    magnitude, is_nan = x.abs().clamp(max=fmt.max), x.isnan()
    spacing = _spacing(magnitude, fmt)
    n = torch.round(magnitude / spacing).nan_to_num_(0).long()
    binades_up = torch.log2(spacing / fmt.smallest).round_().nan_to_num_(0).long()
    code = (binades_up << fmt.mantissa_bits) + n
    if fmt.specials == "none":
        _refuse_nan(is_nan, fmt)
    else:
        code = torch.where(is_nan, (1 << (fmt.bits - 1)) - 1, code)
    code = code + (x.signbit().long() << (fmt.bits - 1))
    return code.to(torch.uint8 if fmt.bits <= 8 else torch.int16)


def round_to(x: Tensor, fmt: str | Format) -> Tensor:
    """The nearest number of the format: ties to the even code, saturating. decode(encode(x)), in fewer steps.

    Args:
        x: any shape; float16, bfloat16 or float32, or float64, which is not rounded to float32 first.
        fmt: a signed format or its name.

    Returns:
        float32 of the same shape. NaN stays NaN; zeros, and what rounds to zero, keep their sign.

    Raises:
        TypeError: x has another dtype. ValueError: NaN where the format has none, or fmt is E8M0.
    """
    fmt = as_format(fmt)
    if not fmt.signed:
        raise ValueError(f"fmt: got {fmt.name}, expected a signed format; a scale is rounded by its quantiser")
    x = _wide(x)
    if fmt.specials == "none":
        _refuse_nan(x.isnan(), fmt)
    clamped = x.clamp(-fmt.max, fmt.max)
    spacing = _spacing(clamped, fmt)
    return (clamped / spacing).round_().mul_(spacing).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, from its bits. exponent: integers from -1022 to 1023."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def floor_power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 |x|) of normal float32 or float64 numbers, exactly: x without sign and mantissa; 0 below them."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def _spacing(clamped: Tensor, fmt: Format) -> Tensor:
    """The distance of the format's numbers in the binade of each x."""
    return floor_power_of_two(clamped).clamp_(min=2.0**fmt.min_exponent).mul_(2.0**-fmt.mantissa_bits)


def _encode_scale(x: Tensor, fmt: Format) -> Tensor:
    exponent = torch.log2(x.double()).round()
    possible = (x > 0) & exponent.isfinite() & (exponent >= -fmt.bias) & (exponent <= fmt.max_exponent)
    possible &= power_of_two(exponent.nan_to_num(0).clamp(-1000, 1000)) == x
    if not possible.all():
        bad = x[~possible].flatten()[0].item()
        raise ValueError(f"x: got {bad!r}, expected powers of two from 2^{-fmt.bias} to 2^{fmt.max_exponent}")
    return (exponent + fmt.bias).to(torch.uint8)


def _refuse_nan(is_nan: Tensor, fmt: Format) -> None:
    if is_nan.any():
        raise ValueError(f"x: {int(is_nan.sum())} of {is_nan.numel()} values are NaN, which {fmt.name} cannot say")


def _wide(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x: got dtype {x.dtype}, expected float16, bfloat16, float32 or float64")
    return x if x.dtype == torch.float64 else x.float()

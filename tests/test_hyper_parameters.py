"""Hyper-parameters of every loss: values out of their range, tensors for fixed numbers, scalars that are tensors."""

import pytest
import torch

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

BAD = {
    "sv t": (lambda: fm.SVSoftmax(0.99), ValueError, r"t = 0.99; expected .* in \[1, inf\]"),
    "mv t": (lambda: fm.MVSoftmax(-0.1), ValueError, r"t = -0.1"),
    "mv kind": (lambda: fm.MVSoftmax(kind="AM"), ValueError, "kind = 'AM'; expected one of 'am', 'arc'"),
    "mv mode": (lambda: fm.MVSoftmax(mode="x"), ValueError, "mode = 'x'"),
    "eqm order": (lambda: fm.EqM(0.3, 0.3), ValueError, "expected t2 < t1: t1 is the bound of the targets"),
    "eqm range": (lambda: fm.EqM(1.2), ValueError, "t1 = 1.2"),
    "eqm per class": (lambda: fm.EqM(fm.PerClass(torch.ones(3))), TypeError, "t1 is one number for all classes"),
    "npc t": (lambda: fm.NPCFace(t=0.5), ValueError, "t = 0.5"),
    "arcneg sigma": (lambda: fm.ArcNegFace(sigma=0), ValueError, "sigma = 0"),
    "curricular m": (lambda: fm.CurricularFace(4), ValueError, "m = 4"),
    "curricular rate": (lambda: fm.CurricularFace(rate=2), ValueError, "rate = 2"),
    "filter": (lambda: fm.InterclassFilter(-0.1), ValueError, "below 0 it would drop rivals that are far away"),
    "circle": (lambda: fm.CircleLoss(-1), ValueError, "m = -1"),
    "x2 rises": (lambda: fm.X2Softmax(a=0.9), ValueError, "T must fall with the angle"),
    "x2 vertex": (lambda: fm.X2Softmax(h=0.2), ValueError, "for theta < h, T would rise"),
    "annealed": (lambda: fm.Annealed(fm.SphereFace(4), -1), ValueError, "lam = -1"),
    "annealed rule": (lambda: fm.Annealed(fm.SVSoftmax()), TypeError, "has a rival rule of its own"),
    "sv of curricular": (lambda: fm.SVSoftmax(1.2, fm.CurricularFace()), TypeError, "has a rival rule of its own"),
    "sv of uniface": (lambda: fm.SVSoftmax(1.2, fm.UniFace(5)), TypeError, "has a rival rule of its own"),
    "l-softmax m": (lambda: fm.LSoftmax(0.5), ValueError, "m = 0.5"),
    "ada m": (lambda: fm.AdaFace(3), ValueError, "m = 3"),
    "mag order": (lambda: fm.MagFace(10, 5), ValueError, "u_a = 5; .* lies above l_a"),
    "mag margins": (lambda: fm.MagFace(u_m=0.1), ValueError, "the margin grows with the norm"),
    "elastic kind": (lambda: fm.ElasticFace(kind="am"), ValueError, "kind = 'am'"),
    "elastic sigma": (lambda: fm.ElasticFace(sigma=-1), ValueError, "sigma = -1"),
    "adam": (lambda: fm.AdaMSoftmax(3, 0.5, 0.4), ValueError, "high = 0.4"),
    "counts": (lambda: fm.margins_by_count(torch.ones(2, 2)), ValueError, r"counts have shape \[2, 2\]"),
    "kappa": (lambda: fm.KappaFace(torch.ones(3), 4, gamma=2), ValueError, "gamma = 2"),
    "sphereface2 t": (lambda: fm.SphereFace2(9, t=0.5), ValueError, "the slope at c = -1 is infinite"),
    "sphereface2 m": (lambda: fm.SphereFace2(9, "M", 0.5), ValueError, "m = 0.5"),
    "sphereface2 classes": (lambda: fm.SphereFace2("A"), ValueError, "num_classes = 'A'; expected an integer"),
    "adam classes": (lambda: fm.AdaMSoftmax(3.5), ValueError, "num_classes = 3.5"),
    "kappa counts": (lambda: fm.KappaFace(torch.ones(2, 2), 4), ValueError, r"counts have shape \[2, 2\]"),
    "kappa no counts": (lambda: fm.KappaFace(torch.zeros(3), 4), ValueError, "counts are all 0; .* of the 3 classes"),
    "kappa below 0": (lambda: fm.KappaFace(torch.tensor([2, -1]), 4), ValueError, r"counts\[1\] = -1; expected"),
    "counts nan": (lambda: fm.margins_by_count(torch.tensor([float("nan")])), ValueError, r"counts\[0\] = nan"),
    "npc m0 + m1": (lambda: fm.NPCFace(m0=1.0, m1=1.0), ValueError, "m0 \\+ m1 is a margin, and beyond pi / 2"),
    "arcface easy": (lambda: fm.ArcFace(1.6, "easy"), ValueError, "beyond pi / 2 the easy margin's T rises"),
    "combined easy": (lambda: fm.CombinedMargin(1.5, 0.9, tail="easy"), ValueError, "m2 = 0.9; .* > pi, T rises"),
    "mv arc easy": (lambda: fm.MVSoftmax(m=2.0, kind="arc"), ValueError, "beyond pi / 2 the easy margin's T rises"),
    "mag easy": (lambda: fm.MagFace(u_m=1.6), ValueError, "u_m = 1.6; .* beyond pi / 2"),
    "sv of l-softmax": (lambda: fm.SVSoftmax(1.2, fm.LSoftmax()), TypeError, "LSoftmax works on products of raw rows"),
    "curricular m for each class": (lambda: fm.CurricularFace(torch.ones(3)), TypeError, "m is one number for all"),
    "uniface": (lambda: fm.UniFace(9, weight=0), ValueError, "weight = 0"),
    "adacos": (lambda: fm.AdaCos(2), ValueError, r"log\(C - 1\) must be positive"),
    "ga": (lambda: fm.GASoftmax(m=0.5), ValueError, "the target would be favoured"),
    "eqm offset": (lambda: fm.EqM(offset=2.1), ValueError, r"offset = 2.1; expected .* in \[0, 2\]"),
    "ga cosine": (lambda: fm.GASoftmax("cosine", 65), ValueError, r"m = 65; expected .* in \[1, 64\]: psi has as many"),
    "sphereface-r v0": (lambda: fm.SphereFaceR(65, 0), ValueError, r"m = 65; .* psi has as many folds"),
    "sphereface-r": (lambda: fm.SphereFaceR(version=3), ValueError, "version = 3; expected 0, 1 or 2"),
    "sface": (lambda: fm.SFace(k=0), ValueError, "k = 0"),
    "qam": (lambda: fm.QAMFace(5), ValueError, "m = 5"),
    "x2 flat": (lambda: fm.X2Softmax(a=0.0), ValueError, "a = 0.0; .* T must fall with the angle"),
    "elastic easy": (lambda: fm.ElasticFace(2.0, tail="easy"), ValueError, "m = 2.0"),
    "kappa easy": (lambda: fm.KappaFace(torch.ones(3), 4, 2.0, tail="easy"), ValueError, "m = 2.0; .* beyond pi / 2"),
    "counts low": (lambda: fm.margins_by_count(torch.ones(3), -0.1), ValueError, "low = -0.1"),
    "counts order": (lambda: fm.margins_by_count(torch.ones(3), 0.5, 0.1), ValueError, "rarer classes get the larger"),
    "li": (lambda: fm.LiArcFace(-0.1), ValueError, "m = -0.1"),
    "sface a": (lambda: fm.SFace(a=4), ValueError, "a = 4"),
    "ada h": (lambda: fm.AdaFace(h=0), ValueError, "h = 0"),
    "ada eps": (lambda: fm.AdaFace(eps=0.5), ValueError, "eps = 0.5"),
    "mag weight": (lambda: fm.MagFace(weight=-1), ValueError, "weight = -1"),
    "adam weight": (lambda: fm.AdaMSoftmax(3, weight=-1), ValueError, "weight = -1"),
    "sphereface2 balance": (lambda: fm.SphereFace2(9, balance=1), ValueError, "balance = 1"),
    "sphereface2 angle": (lambda: fm.SphereFace2(9, "A", 4), ValueError, "m = 4"),
    "combined": (lambda: fm.CombinedMargin(m2=-0.1), ValueError, "m2 = -0.1"),
    "ga k": (lambda: fm.GASoftmax("sigmoid", k=0), ValueError, "k = 0"),
    "sphereface-r m": (lambda: fm.SphereFaceR(0.9), ValueError, "m = 0.9"),
    "sphereface-r pull": (lambda: fm.SphereFaceR(norm="soft", pull=-1), ValueError, "pull = -1"),
    "circle m": (lambda: fm.CircleLoss(1.1), ValueError, "m = 1.1"),
    "filter above": (lambda: fm.InterclassFilter(1.1), ValueError, "above = 1.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyper_parameters(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


PLAIN = {  # numbers that are fixed: a tensor in their place would be read on the host, or follow no device
    "AdaFace": (lambda **o: fm.AdaFace(**o), ("h", "rate", "eps")),
    "CurricularFace": (lambda **o: fm.CurricularFace(**o), ("rate",)),
    "MagFace": (lambda **o: fm.MagFace(**o), ("l_a", "u_a", "l_m", "u_m", "weight")),
    "ElasticFace": (lambda **o: fm.ElasticFace(**o), ("sigma",)),
    "AdaMSoftmax": (lambda **o: fm.AdaMSoftmax(5, **o), ("low", "high", "weight")),
    "KappaFace": (lambda **o: fm.KappaFace(torch.ones(5), 4, **o), ("m", "temperature", "gamma")),
    "margins_by_count": (lambda **o: fm.margins_by_count(torch.ones(5), **o), ("low", "high", "power")),
    "SphereFace2": (lambda **o: fm.SphereFace2(5, **o), ("m", "t", "balance", "weight", "scale")),
    "UniFace": (lambda **o: fm.UniFace(5, **o), ("weight",)),
    "SphereFaceR": (lambda **o: fm.SphereFaceR(**o), ("weight", "pull", "length")),
    "Focal": (lambda **o: fm.Focal(**o), ("gamma", "alpha")),
    "HardRows": (lambda **o: fm.HardRows(**o), ("keep",)),
    "CenterLoss": (lambda **o: fm.CenterLoss(4, 5, **o), ("alpha",)),
    "MarginHead": (lambda **o: fm.MarginHead(4, 5, **o), ("label_smoothing",)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers_refuse_tensors(name):
    make, parameters = PLAIN[name]
    for parameter in parameters:
        for value in (torch.tensor(0.5), torch.nn.Parameter(torch.tensor(0.5)), fm.PerClass(torch.ones(5))):
            with pytest.raises(
                TypeError, match=rf"^{parameter}: got a \w+; expected a plain number, as in {parameter}="
            ):
                make(**{parameter: value})


SCALARS = {  # one number for all, that may be a 0-dim tensor
    "SVSoftmax": (fm.SVSoftmax, {"t": 1.2}),
    "MVSoftmax": (fm.MVSoftmax, {"t": 0.2}),
    "MVSoftmax fixed": (lambda **o: fm.MVSoftmax(mode="fixed", **o), {"t": 0.3}),
    "CurricularFace": (fm.CurricularFace, {"m": 0.4}),
    "NPCFace": (fm.NPCFace, {"m": 0.4, "t": 1.2, "a": 0.1}),
    "ArcNegFace": (fm.ArcNegFace, {"alpha": 1.1, "sigma": 1.5}),
    "EqM": (fm.EqM, {"t1": 0.7, "t2": 0.2}),
    "EqM offset": (fm.EqM, {"offset": 0.3}),
    "InterclassFilter": (fm.InterclassFilter, {"above": 0.3}),
    "CircleLoss": (fm.CircleLoss, {"m": 0.3}),
    "AdaFace": (fm.AdaFace, {"m": 0.3}),
    "ElasticFace": (lambda **o: fm.ElasticFace(sigma=0, **o), {"m": 0.3}),
    "UniFace": (lambda **o: fm.UniFace(9, **o), {"m": 0.3}),
    "Annealed": (lambda **o: fm.Annealed(fm.SphereFace(2), **o), {"lam": 3.0}),
    "GASoftmax": (lambda **o: fm.GASoftmax("sigmoid", **o), {"k": 0.4}),
    "SFace": (fm.SFace, {"k": 8.0, "a": 0.7, "b": 1.1}),
    "SphereFaceR": (fm.SphereFaceR, {"m": 1.3}),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_scalar_tensor_is_the_number(name):
    make, parameters = SCALARS[name]
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (7, 9))
    losses = [
        margin_cross_entropy(x, w, torch.arange(7), make(**given), scale=8.0, reduction="none", backend="reference")
        for given in (parameters, {n: torch.tensor(v, dtype=torch.float64) for n, v in parameters.items()})
    ]
    torch.testing.assert_close(*losses)
    for parameter, value in parameters.items():
        with pytest.raises(TypeError, match=f"^{parameter} asks for a gradient"):
            make(**{parameter: torch.tensor(value, requires_grad=True)})
        if name not in ("NPCFace", "SphereFaceR"):
            with pytest.raises(TypeError, match=f"^{parameter} is one number for all classes"):
                make(**{parameter: torch.full((9,), value)})

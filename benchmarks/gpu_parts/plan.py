"""All cases, in the order in which a card does them: what is proven, most valuable first; then each of the rest alone.

What needs no card comes late: nothing that happens to the card can harm it.
Proven is what has run on an H200 before (2026-11-26). A new kernel, a capture, a decoder, a cache begins as not proven.
"""

from benchmarks.gpu_parts.runner import ALL_CORES, Case
from benchmarks.gpu_parts.setting import ENGINES_OF_H100

HERE = "benchmarks.gpu_parts"
PARTS = ("data", "ceilings", "loaders", "step", "training", "checks", "peers")
SOURCES = ("frames", "shards144", "raw128", "video")
TRITON, BF16, CUDNN = {"crf_backend": "triton"}, {"bf16_input": True}, {"cudnn_benchmark": True}
GRAPH, FIXED, FUSED = {"graph": True}, {"deterministic": True}, {"fused": "both"}
QUICK_TO_START = {
    "graph + fused + Triton CRF + cudnn.benchmark": GRAPH | FUSED | TRITON | CUDNN,
    "graph + cudnn.benchmark": GRAPH | CUDNN,
    "graph": GRAPH,
    "graph + fixed algorithms": GRAPH | FIXED,
    "fixed algorithms": FIXED,
    "DDP of one process": {"ddp": True},
    "DDP of one process, graph": {"ddp": True} | GRAPH,
    "graph + Triton CRF + cudnn.benchmark": GRAPH | TRITON | CUDNN,
    "graph + fused + cudnn.benchmark": GRAPH | FUSED | CUDNN,
    "fused": FUSED,
    "fused norm": {"fused": "norm"},
    "fused pool": {"fused": "pool"},
    "Triton CRF": TRITON,
    "bf16 input": BF16,
    "cudnn.benchmark": CUDNN,
    "Triton CRF + bf16 input + cudnn.benchmark": TRITON | BF16 | CUDNN,
}
DEFAULT_MODEL = {
    "both branches": {"default": True},
    "both branches, graph": {"default": True} | GRAPH,
    "both branches, all of the above": {"default": True} | GRAPH | FUSED | TRITON | CUDNN,
}  # beside the first version's, which all else is measured on
COMPILED = {  # a minute for each batch size
    "compiled": {"compiled": True},
    "compiled + Triton CRF + bf16 input": {"compiled": True} | TRITON | BF16,
}
# Places of the setting's batch sizes: the most telling, the smallest, the others.
TELLING, SMALL, OTHERS = (0,), (1,), (2, 3)


def all_cases() -> list[Case]:
    """The whole plan."""
    all_cores, *fewer = loaders_by_cores()
    return [
        *on_the_cpu_first(),
        *proven(),
        *one_kernel(),
        *alone(),
        all_cores,
        *small_batches(),
        *fewer,
        *peers(),
        *the_rest(),
    ]


def on_the_cpu_first() -> list[Case]:
    return [
        Case("data", "data", f"{HERE}.data", "prepare", limit_s=150, proven=True, gpu=False),
        Case("data", "counts", f"{HERE}.steps", "counted", limit_s=60, proven=True, gpu=False),
    ]


def ceiling(name: str, function: str, proven: bool = True, gpu: bool = True, **options: object) -> Case:
    return Case("ceilings", name, f"{HERE}.decoders", function, options, limit_s=60, proven=proven, gpu=gpu)


def check(name: str, function: str, options: dict, proven: bool = False, limit_s: float = 60) -> Case:
    module = "mixing" if function in ("both", "of_loader", "control_in_graph", "control_torchvision") else "checks"
    return Case("checks", name, f"{HERE}.{module}", function, options, limit_s=limit_s, proven=proven)


def proven() -> list[Case]:
    """What shares one child on the card."""
    cases = [
        Case("ceilings", "copies and product", f"{HERE}.ceilings", "copies_and_product", limit_s=60, proven=True),
        ceiling("nvJPEG on SMs", "jpeg", where=["sms"]),
        ceiling("libjpeg-turbo on all cores", "jpeg", gpu=False, where=["cores"]),
        ceiling("libjpeg-turbo on all cores, crops", "jpeg", gpu=False, where=["cores"], crop=True),
        ceiling("NVDEC, one session", "videos", sessions=1),
        ceiling("FFmpeg on all cores", "videos_on_cores", gpu=False),
    ]
    # Where NVDEC takes 13 ms for a clip, a large batch takes seconds.
    sources = {name: {"source": name} for name in SOURCES if name != "video"}
    sources["video, NVDEC"] = {"source": "video", "batch": 16, "nvdec": 1}
    for name, options in sources.items():
        cases.append(Case("loaders", f"loader {name}", f"{HERE}.loaders", "alone", options, limit_s=45, proven=True))
    for place in range(4):  # of the setting's batch sizes
        options = {"place": place}
        cases.append(Case("step", f"eager {place}", f"{HERE}.steps", "eager", options, limit_s=60, proven=True))
    cases.append(Case("step", "floors", f"{HERE}.steps", "floors", limit_s=60, proven=True))
    for name, options in sources.items():
        cases.append(_training(f"training from {name}", options))
    cases.append(Case("loaders", "feeding", f"{HERE}.loaders", "feed", limit_s=60, proven=True, gpu=False))
    # Tracing loads what slows launches down in the same process: nothing that is timed comes after it.
    cases.append(Case("step", "traces", f"{HERE}.steps", "traces", limit_s=60, proven=True))
    for name, options in sources.items():
        options = {key: value for key, value in options.items() if key != "batch"}
        cases.append(check(f"clips of {name}", "clips_against_cpu", options, proven=True))
    cases.append(check("mixing, engine 0", "both", {"engine": 0.0}, proven=True))
    cases.append(check("eager against eager", "eager_against_eager", {}, proven=True, limit_s=120))
    return cases


def _training(name: str, options: dict, proven: bool = True) -> Case:
    return Case("training", name, f"{HERE}.training", "from_source", options, limit_s=60, proven=proven)


def videos() -> list[Case]:
    """Of videos what is not proven: the cores decode and the card does the rest; NVDEC in several sessions."""
    cases = []
    for name, options in {
        "video": {"source": "video"},
        "video, NVDEC, all engines": {"source": "video", "nvdec": ENGINES_OF_H100},
    }.items():
        cases.append(check(f"clips of {name}", "clips_against_cpu", options))
        cases.append(Case("loaders", f"loader {name}", f"{HERE}.loaders", "alone", options, limit_s=60))
        cases.append(_training(f"training from {name}", options, proven=False))
    return cases


def one_kernel() -> list[Case]:
    """The kernel that makes clips of decoded frames: by itself, and behind each way that the frames come."""
    cases = [
        Case("ceilings", f"kernel alone, {side} px", f"{HERE}.pixels", "kernel_alone", {"side": side}, limit_s=60)
        for side in (128, 224)
    ]
    graphs = {"raw128": "streamed", "shards144": "decoded", "frames": "decoded"}
    routes = {f"{source}, {graph}": {"source": source, "graph": graph} for source, graph in graphs.items()}
    routes["raw128 held"] = {"source": "raw128", "held": True}
    for name, options in routes.items():
        cases.append(check(f"clips of {name}", "clips_against_cpu", options))
        cases.append(Case("loaders", f"loader {name}", f"{HERE}.loaders", "alone", options, limit_s=60))
        cases.append(_training(f"training from {name}", options, proven=False))
    mixing = {"engine": 0.0, "graph": "decoded"}
    return [*cases, check("mixing, engine 0, decoded", "of_loader", mixing)]


def loaders_by_cores() -> list[Case]:
    """The CPU's loader on all cores of the machine and on fewer."""
    work = (f"{HERE}.loaders", "on_cpu")
    return [
        Case("loaders", f"CPU loader, cores: {told}", *work, limit_s=90, proven=True, gpu=False, cores=cores)
        for told, cores in (("all", ALL_CORES), ("1", 1), ("2", 2), ("4", 4), ("8", 8))
    ]


def alone() -> list[Case]:
    """What is not proven: each in a child of its own."""
    cases = [check(f"mixing, engine {engine:g}", "both", {"engine": engine}) for engine in (0.65, 1.0)]
    cases += [
        check("mixing, control in the graph", "control_in_graph", {"engine": 1.0}),
        check("mixing, control torchvision", "control_torchvision", {}),
    ]
    for name, options in QUICK_TO_START.items():
        cases.append(_variant(name, options, TELLING))
        cases.append(_against_eager(name, options))
    cases += [*videos(), *(_variant(name, options, TELLING) for name, options in DEFAULT_MODEL.items())]
    cases.append(check("bits of fixed algorithms", "bits_of_fixed_algorithms", {}, limit_s=120))
    cases.append(check("two processes", "two_processes", {}))
    cases += [
        _operators("eager", {}),
        _operators("fused", FUSED),
        _operators("fused + Triton CRF + bf16 input + cudnn.benchmark", FUSED | TRITON | BF16 | CUDNN),
    ]
    for backend in ("dense", "triton"):
        options = {"backend": backend}
        cases.append(Case("step", f"share of the CRF, {backend}", f"{HERE}.steps", "share_of_crf", options, limit_s=60))
    cases += [
        ceiling("JPEG engine", "jpeg", proven=False, where=["engine"]),
        ceiling("nvJPEG on both", "jpeg", proven=False, where=["both"]),
        ceiling("SMs, engine and cores together", "jpeg", proven=False, where=["sms", "engine", "cores"]),
        ceiling("nvJPEG on SMs, crops", "jpeg", proven=False, where=["sms"], crop=True),
        ceiling("NVDEC, all engines", "videos", proven=False, sessions=None),
        Case("ceilings", "NVDEC's limits", f"{HERE}.nvdec", "told", limit_s=60),
    ]
    for engine in (0.65, 1.0):
        options = {"source": "frames", "engine": engine}
        name = f"loader frames, engine {engine:g}"
        cases.append(Case("loaders", name, f"{HERE}.loaders", "alone", options, limit_s=60))
        cases.append(check(f"clips of frames, engine {engine:g}", "clips_against_cpu", options))
    return cases


def small_batches() -> list[Case]:
    """The variants on the batch of 16: launches, not kernels, are what they wait for there."""
    return [_variant(name, options, SMALL) for name, options in (QUICK_TO_START | DEFAULT_MODEL).items()]


def the_rest() -> list[Case]:
    """Also each in a child of its own, last since it takes long or tells little more."""
    cases = []
    for name, options in COMPILED.items():
        cases.append(_variant(name, options, TELLING, limit_s=150))
        cases.append(_against_eager(name, options, limit_s=150))
    cases.append(check("eager against eager, for long", "eager_for_long", {}))
    cases += [_variant(name, options, SMALL, limit_s=150) for name, options in COMPILED.items()]
    return cases + [
        _variant(name, options, OTHERS, limit_s=300) for name, options in (QUICK_TO_START | COMPILED).items()
    ]


def _variant(name: str, options: dict, places: tuple[int, ...], limit_s: float = 90) -> Case:
    more = {TELLING: "", SMALL: ", small batch", OTHERS: ", other batches"}[places]
    work = {"name": name, "options": options, "places": places}
    return Case("step", f"step, {name}{more}", f"{HERE}.steps", "variant", work, limit_s=limit_s)


def _operators(name: str, options: dict) -> Case:
    work = {"name": name, "options": options}
    return Case("step", f"operators of a step, {name}", f"{HERE}.steps", "operators", work, limit_s=60)


def _against_eager(name: str, options: dict, limit_s: float = 75) -> Case:
    work = {"name": name, "options": options}
    return check(f"{name} against eager", "variant_against_eager", work, limit_s=limit_s)


def peers() -> list[Case]:
    names = ("torchvision_on_card", "simplejpeg_and_copy", "spdl", "torchcodec_videos")
    return [Case("peers", f"peer {name}", f"{HERE}.peers", name, limit_s=45) for name in names]

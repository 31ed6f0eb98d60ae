"""All cases, in the order in which a card does them: what matters most first.

What a user of a card has comes within some 200 s, all that matters in some 600: estimates, by a child that takes 8 s to
begin, and a first step that takes 10 to compile and to try out.

Cases that follow each other and name the same child share a process, since a start takes 8 s on a card. One that dies
costs itself; those after it begin another child. Within a child speeds come first: a trace loads what slows launches
down, and what libraries have chosen for one kind of step would serve the next.
"""

from dataclasses import replace

from benchmarks.gpu_parts.runner import ALL_CORES, Case
from benchmarks.gpu_parts.setting import BATCHES, ENGINES_OF_H100

HERE = "benchmarks.gpu_parts"
PARTS = ("data", "ceilings", "loaders", "step", "training", "checks", "peers", "warm", "grid")
ASKED = ("peers", "warm", "grid")  # parts that are done only if they are asked for
SOURCES = ("frames", "shards144", "raw128", "video")
GRAPH, FIXED, FUSED, DEFAULT = {"graph": True}, {"deterministic": True}, {"fused": "all"}, {"default": True}
TRITON, BF16, CUDNN = {"crf_backend": "triton"}, {"bf16_input": True}, {"cudnn_benchmark": True}
FAST = GRAPH | FUSED | TRITON | CUDNN  # as train.py takes its steps on a card
SINGLE = {  # options apart and together, all of the first version's model, which the first figures of a card were of
    "graph": GRAPH,
    "fused": FUSED,
    "fused norm": {"fused": "norm"},
    "fused pool": {"fused": "pool"},
    "fused weights": {"fused": "weights"},
    "Triton CRF": TRITON,
    "bf16 input": BF16,
    "cudnn.benchmark": CUDNN,
    "graph + cudnn.benchmark": GRAPH | CUDNN,
    "graph + Triton CRF + cudnn.benchmark": GRAPH | TRITON | CUDNN,
    "graph + fused + cudnn.benchmark": GRAPH | FUSED | CUDNN,
    "fixed algorithms": FIXED,
    "graph + fixed algorithms": GRAPH | FIXED,
    "DDP of one process": {"ddp": True},
    "DDP of one process + graph": {"ddp": True} | GRAPH,
}
COMPILED = {  # a minute for each batch size
    "compiled": {"compiled": True},
    "compiled + Triton CRF + bf16 input": {"compiled": True} | TRITON | BF16,
}
# How the trainer's clips come to a card: those of videos by the cores.
ROUTES = {
    "frames": {"source": "frames", "graph": "decoded"},
    "frames by the cores": {"source": "frames", "graph": "streamed", "engine": None},
    "shards144 by the cores": {"source": "shards144", "graph": "streamed", "engine": None},
    "frames by cores and SMs": {"source": "frames", "graph": "streamed", "engine": "half"},
    "shards144 by cores and SMs": {"source": "shards144", "graph": "streamed", "engine": "half"},
    "shards144": {"source": "shards144", "graph": "decoded"},
    "raw128": {"source": "raw128", "graph": "streamed"},
    "raw128 held": {"source": "raw128", "held": True},
}
VIDEO = {"source": "video"}
NVDEC = {"source": "video", "nvdec": ENGINES_OF_H100}
ALL = range(len(BATCHES))  # places of the setting's batch sizes


def all_cases() -> list[Case]:
    """The whole plan."""
    return [*data(), *warm(), *what_matters(), *the_rest(), *peers(), *grid()]


def data() -> list[Case]:
    """What all others but `warm` need."""
    return [
        Case("data", "data", f"{HERE}.data", "prepare", limit_s=150, child="data", gpu=False),
        Case("data", "counts", f"{HERE}.steps", "counted", limit_s=90, child="data", gpu=False),
    ]


def warm() -> list[Case]:
    """What fills Triton's cache, beside tests or the drawing of the data: it needs none."""
    models = {"static": FAST, "default": FAST | DEFAULT}
    return [
        Case("warm", f"warm {model}", f"{HERE}.steps", "warm", {"options": options}, limit_s=150)
        for model, options in models.items()
    ]


def what_matters() -> list[Case]:
    """What a card is asked for first, most valuable first."""
    copies = Case("ceilings", "copies and product", f"{HERE}.ceilings", "copies_and_product", limit_s=60)
    default = FAST | DEFAULT
    return [
        *together("default", [step("default fast", default, place) for place in (0, 1)]),
        as_user("train.py as a user", {}),
        *together("feed", [case for name in ROUTES for case in (loader(name), training(name))]),
        *together("clips", [*map(clips, ROUTES), mixing(0.0)]),
        *together("video", of_videos("video", VIDEO)),
        check("memory over 2000 steps", "soak", {"how": FAST}, limit_s=90, module="training"),
        share_of_crf(FAST),
        *together("nvJPEG", [jpeg("nvJPEG on SMs", ["sms"]), jpeg("nvJPEG on SMs and crops only", ["sms"], crop=True)]),
        check("bits of fixed algorithms", "bits_of_fixed_algorithms", limit_s=120),
        *together("NVDEC", of_videos("video by NVDEC", NVDEC)),
        *together("default more", [copies, floors("default", **DEFAULT), *measured("default fast", default)[2:]]),
        *together("static", [floors("static"), *measured("static fast", FAST)]),
        *together("eager", measured("static eager", {}, (0, 1))),
        as_user("train.py as a user B=16", {"batch": 16}),
    ]


def the_rest() -> list[Case]:
    """What tells more of a card, or of the machine around it, for a longer budget or a further call."""
    return [
        operators("fused + Triton CRF + cudnn.benchmark", FUSED | TRITON | CUDNN),
        operators("fused", FUSED),
        operators("eager", {}),
        *cpu_loaders(),
        check("bits of fixed algorithms default", "bits_of_fixed_algorithms", DEFAULT, limit_s=120),
        *engine(),
        check("eager against eager", "eager_against_eager", limit_s=120),
        *(case for name, options in (SINGLE | {"static fast": FAST}).items() for case in single(name, options)),
        check("two processes", "two_processes"),
        *decoders(),
        share_of_crf(FAST | {"crf_backend": "dense"}),
        gain("weights cast at once", FAST, FAST | {"fused": "both"}),
        Case("step", "stem padded", f"{HERE}.stem", "padded", limit_s=60),
    ]


def grid() -> list[Case]:
    """The options on all other batches, and what a compiler makes of the step: half an hour."""
    cases = [check("eager against eager for long", "eager_for_long")]
    for name, options in COMPILED.items():
        cases += [replace(case, part="grid", limit_s=150) for case in (step(name, options, 0), step(name, options, 1))]
        cases.append(against_eager(name, options, limit_s=150))
    for name, options in SINGLE.items():
        cases += together(f"{name} more", [step(name, options, place) for place in ALL if place])
    return [replace(case, part="grid") for case in cases]


# ---- Cases.


def together(child: str, cases: list[Case]) -> list[Case]:
    """Have a series of cases share a child."""
    return [replace(case, child=child) for case in cases]


def step(name: str, options: dict, place: int, function: str = "speed", what: str = "") -> Case:
    work = {"name": name, "options": options, "place": place}
    return Case("step", f"{what}{name} B={BATCHES[place]}", f"{HERE}.steps", function, work, limit_s=120)


def measured(name: str, options: dict, places: tuple[int, ...] | range = ALL) -> list[Case]:
    """The speeds of a step on some batch sizes, then traces of each."""
    speeds = [step(name, options, place) for place in places]
    return [*speeds, *(step(name, options, place, "busy", "busy ") for place in places)]


def single(name: str, options: dict) -> list[Case]:
    """A kind of step on the most telling batch, if it is not among what matters, and whether it computes the same."""
    cases = [] if options == FAST else together(name, measured(name, options, (0,)))
    return [*cases, against_eager(name, options)]


def floors(name: str, default: bool = False) -> Case:
    return Case("step", f"floors {name}", f"{HERE}.steps", "floors", {"default": default}, limit_s=60)


def operators(name: str, options: dict) -> Case:
    work = {"name": name, "options": options}
    return Case("step", f"operators of a step {name}", f"{HERE}.steps", "operators", work, limit_s=60)


def gain(name: str, options: dict, base: dict) -> Case:
    work = {"name": name, "options": options, "base": base}
    return Case("step", f"gain of {name}", f"{HERE}.steps", "gain", work, limit_s=90)


def share_of_crf(options: dict) -> Case:
    name = f"share of the CRF {options['crf_backend']}"
    return Case("step", name, f"{HERE}.steps", "share_of_crf", {"options": options}, limit_s=120)


def check(name: str, function: str, options: dict | None = None, limit_s: float = 60, module: str = "checks") -> Case:
    return Case("checks", name, f"{HERE}.{module}", function, options or {}, limit_s=limit_s)


def against_eager(name: str, options: dict, limit_s: float = 75) -> Case:
    work = {"name": name, "options": options}
    return check(f"{name} against eager", "variant_against_eager", work, limit_s)


def clips(name: str) -> Case:
    return check(f"clips of {name}", "clips_against_cpu", ROUTES[name])


def mixing(engine: float) -> Case:
    return check(f"mixing engine {engine:g}", "both", {"engine": engine, "graph": "decoded"}, module="mixing")


def loader(name: str) -> Case:
    return Case("loaders", f"loader {name}", f"{HERE}.loaders", "alone", ROUTES[name], limit_s=60)


def training(name: str) -> Case:
    options = {"how": FAST, **ROUTES[name]}
    return Case("training", f"training from {name}", f"{HERE}.training", "from_source", options, limit_s=60)


def as_user(name: str, options: dict) -> Case:
    return Case("training", name, f"{HERE}.user", "as_user", options, limit_s=150)


def of_videos(name: str, options: dict) -> list[Case]:
    """The loader of videos, training from it, and its clips, which nobody has timed on a card before."""
    batch = {"batch": 16}  # of larger ones NVDEC makes a few in a minute
    work = {"how": FAST, **options, **batch}
    return [
        Case("loaders", f"loader {name}", f"{HERE}.loaders", "alone", options | batch, limit_s=60),
        Case("training", f"training from {name}", f"{HERE}.training", "from_source", work, limit_s=60),
        check(f"clips of {name}", "clips_against_cpu", options),
    ]


def decoder(name: str, function: str, gpu: bool = True, **options: object) -> Case:
    """A decoder alone, and beside the step if there is a card."""
    return Case("ceilings", name, f"{HERE}.decoders", function, {"how": FAST, **options}, limit_s=60, gpu=gpu)


def jpeg(name: str, where: list[str], gpu: bool = True, crop: bool = False) -> Case:
    return decoder(name, "jpeg", gpu, where=where, crop=crop)


def decoders() -> list[Case]:
    """What else decodes, and the kernel that makes clips of what is decoded."""
    return [
        *(
            Case("ceilings", f"kernel alone {side} px", f"{HERE}.pixels", "kernel_alone", {"side": side}, limit_s=60)
            for side in (128, 224)
        ),
        jpeg("libjpeg-turbo on all cores", ["cores"], gpu=False),
        jpeg("libjpeg-turbo on all cores and crops only", ["cores"], gpu=False, crop=True),
        jpeg("JPEG engine", ["engine"]),
        jpeg("nvJPEG on both", ["both"]),
        jpeg("SMs and engine and cores together", ["sms", "engine", "cores"]),
        decoder("FFmpeg on all cores", "videos_on_cores", gpu=False),
        decoder("NVDEC one session", "videos", sessions=1),
        decoder("NVDEC all engines", "videos", sessions=None),
        Case("ceilings", "NVDEC's limits", f"{HERE}.nvdec", "told", limit_s=60),
        Case("loaders", "feeding", f"{HERE}.loaders", "feed", limit_s=60, gpu=False),
    ]


def cpu_loaders() -> list[Case]:
    """The CPU's loader on all cores of the machine and on fewer."""
    few = ("frames", "shards144")  # whose decoding scales, or does not
    return [
        Case(
            "loaders", f"CPU loader on {told}", f"{HERE}.loaders", "on_cpu",
            {"sources": SOURCES if cores == ALL_CORES else few}, limit_s=90, gpu=False, cores=cores,
        )
        for told, cores in (("all cores", ALL_CORES), ("1 core", 1), *((f"{n} cores", n) for n in (2, 4, 8)))
    ]  # fmt: skip


def engine() -> list[Case]:
    """The JPEG engine, which public reports say mixes the pixels of two batches."""
    cases = []
    for share in (0.65, 1.0):
        options = {**ROUTES["frames"], "engine": share}
        name = f"frames engine {share:g}"
        cases.append(Case("loaders", f"loader {name}", f"{HERE}.loaders", "alone", options, limit_s=60))
        cases += [check(f"clips of {name}", "clips_against_cpu", options), mixing(share)]
    return [
        *cases,
        check("mixing control in the graph", "control_in_graph", {"engine": 1.0}, module="mixing"),
        check("mixing control torchvision", "control_torchvision", module="mixing"),
    ]


def peers() -> list[Case]:
    names = ("torchvision_on_card", "simplejpeg_and_copy", "spdl", "torchcodec_videos")
    return [Case("peers", f"peer {name}", f"{HERE}.peers", name, limit_s=45) for name in names]

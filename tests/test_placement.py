import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from evaluation.engines.placement import (
    GIB,
    Gpu,
    MemoryNeeds,
    find_gpus,
    gpus_asked_for,
    memory_needs,
    plan_engines,
    read_gpus,
)

QWEN_1_7B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN_8B = QWEN_1_7B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
SMALL, LARGE = memory_needs("1.7B", QWEN_1_7B, 0, 8192), memory_needs("8B", QWEN_8B, 0, 8192)
HUGE = MemoryNeeds("70B", 140 * GIB, 320 * 1024, 300_000, 500_000_000, 8, 8192)


def gpus(n: int, gib: float, free: float | None = None) -> list[Gpu]:
    return [Gpu(str(k), "GPU", int(gib * GIB), int((free or gib - 0.5) * GIB)) for k in range(n)]


def test_sizes_computed_from_the_shapes_match_the_published_ones() -> None:
    assert SMALL.weights == pytest.approx(3.44e9, rel=0.01)
    assert LARGE.weights == pytest.approx(16.4e9, rel=0.01)
    assert LARGE.cache_per_token == 147_456


def test_weights_saved_in_32_bits_need_half_the_size_of_their_files() -> None:
    assert memory_needs("m", QWEN_1_7B | {"torch_dtype": "float32"}, 1000, 8192).weights == 500
    assert memory_needs("m", QWEN_1_7B | {"torch_dtype": "bfloat16"}, 1000, 8192).weights == 1000


def test_a_model_of_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UserError, match="no 'hidden_size'"):
        memory_needs("gpt2", {"n_embd": 768}, 1000, 8192)


def test_both_models_share_an_80_gb_card_within_the_bound() -> None:
    for utilization in (0.9, 0.6):
        plan = plan_engines(gpus(1, 79), SMALL, LARGE, utilization)
        assert plan.together
        assert "both at once" in plan.summary
        shares = [p.vllm_args["gpu_memory_utilization"] for p in (plan.generator, plan.judge)]
        assert sum(shares) <= utilization
        for placement, model in ((plan.generator, SMALL), (plan.judge, LARGE)):
            held = model.weights + placement.vllm_args["kv_cache_memory_bytes"]
            assert held < placement.vllm_args["gpu_memory_utilization"] * 79 * GIB


def test_on_a_24_gb_card_the_models_run_in_turn() -> None:
    plan = plan_engines(gpus(1, 23.5), SMALL, LARGE, 0.9)
    assert not plan.together
    assert plan.summary.endswith("one after the other")
    assert [p.devices for p in (plan.generator, plan.judge)] == [("0",), ("0",)]
    assert all(p.vllm_args["gpu_memory_utilization"] <= 0.9 for p in (plan.generator, plan.judge))


def test_memory_used_by_others_is_left_to_them() -> None:
    plan = plan_engines(gpus(1, 79, free=30), SMALL, LARGE, 0.9)
    assert not plan.together
    assert plan.judge.vllm_args["gpu_memory_utilization"] * 79 < 30


def test_a_model_that_fits_on_one_gpu_gets_a_replica_on_each() -> None:
    plan = plan_engines(gpus(4, 79), SMALL, LARGE, 0.9)
    assert plan.generator.devices == plan.judge.devices == ("0", "1", "2", "3")
    assert plan.together
    assert "4 replicas" in plan.summary


def test_a_model_too_large_for_one_gpu_is_split_over_the_fewest() -> None:
    plan = plan_engines(gpus(8, 79), SMALL, HUGE, 0.9)
    assert plan.judge.vllm_args["tensor_parallel_size"] == 4
    assert plan.judge.devices == ("0,1,2,3", "4,5,6,7")
    assert plan.generator.vllm_args["tensor_parallel_size"] == 1
    assert not plan.together
    assert "2 replicas of 4 GPUs" in plan.summary


@pytest.mark.parametrize(
    ("args", "devices"),
    [
        ({"tensor_parallel_size": 2}, ("0,1", "2,3")),
        ({"tensor_parallel_size": 4}, ("0,1,2,3",)),
        ({"tensor_parallel_size": 1}, ("0", "1", "2", "3")),
        ({"pipeline_parallel_size": 1}, ("0", "1", "2", "3")),
    ],
)
def test_a_model_is_split_over_as_many_gpus_as_the_user_asks_for(args: dict, devices: tuple) -> None:
    wanted = replace(LARGE, gpus=gpus_asked_for(args))
    plan = plan_engines(gpus(4, 79), SMALL, wanted, 0.9)
    assert plan.judge.devices == devices
    assert plan.judge.vllm_args["tensor_parallel_size"] == 4 // len(devices)
    assert plan.together is (len(devices) == 4)


def test_more_gpus_than_there_are_and_other_values_are_refused() -> None:
    with pytest.raises(UserError, match="split over 8 GPUs, but there are 4"):
        plan_engines(gpus(4, 79), None, replace(LARGE, gpus=8), 0.9)
    for value in (0, -1, "2", None, 1.5):
        with pytest.raises(UserError, match="a number of GPUs"):
            gpus_asked_for({"tensor_parallel_size": value})
    with pytest.raises(UserError, match="with tensor_parallel_size"):
        gpus_asked_for({"pipeline_parallel_size": 2})


def test_a_model_that_fits_nowhere_is_refused_with_advice() -> None:
    with pytest.raises(UserError, match=r"70B .* does not fit: .*smaller"):
        plan_engines(gpus(1, 79), SMALL, HUGE, 0.9)
    with pytest.raises(UserError, match="8B needs"):
        plan_engines([], None, LARGE, 0.9, free_ram=16 * GIB)


def test_a_single_stage_gets_the_whole_card() -> None:
    plan = plan_engines(gpus(1, 79), None, LARGE, 0.9)
    assert plan.generator is None
    assert plan.judge.vllm_args["gpu_memory_utilization"] == pytest.approx(0.9, abs=0.001)
    assert "kv_cache_memory_bytes" not in plan.judge.vllm_args


def test_without_a_gpu_the_engines_run_in_turn_on_the_cpu() -> None:
    tiny = memory_needs("tiny", QWEN_1_7B | {"num_hidden_layers": 2}, 0, 4096)
    plan = plan_engines([], tiny, tiny, 0.9)
    assert not plan.together
    assert plan.generator.devices == ("",)
    assert "CPU" in plan.summary


@pytest.mark.parametrize(
    ("visible", "ids"),
    [(None, ["0", "1"]), ("1,0", ["1", "0"]), ("GPU-b", ["1"]), ("", []), ("-1", []), ("0,7,1", ["0"])],
)
def test_cuda_visible_devices_chooses_the_gpus(visible: str | None, ids: list[str]) -> None:
    output = "0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 81000\n1, GPU-b, NVIDIA H100 80GB HBM3, 81559, 40000\n"
    found = read_gpus(output, visible)
    assert [gpu.id for gpu in found] == ids
    assert all(gpu.total == 81559 << 20 for gpu in found)


@pytest.mark.parametrize("visible", ["MIG-0a1b", "0,MIG-0a1b", "7", "GPU-c"])
def test_a_visible_device_unknown_to_nvidia_smi_is_an_error(visible: str) -> None:
    with pytest.raises(UserError, match=rf"CUDA_VISIBLE_DEVICES={visible}: .*{visible[-5:]}"):
        read_gpus("0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 81000\n", visible)


def test_a_gpu_of_unknown_memory_is_an_error_unless_it_is_excluded() -> None:
    output = "0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 81000\n1, GPU-b, NVIDIA GB10, [N/A], [N/A]\n"
    with pytest.raises(UserError, match=r"\[N/A\].* GPU 1, NVIDIA GB10"):
        read_gpus(output, None)
    assert [gpu.id for gpu in read_gpus(output, "0")] == ["0"]


def test_a_driver_that_hangs_is_an_error_but_a_missing_driver_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == []

    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 30)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"nvidia-smi has not answered for 30 s; .*CUDA_VISIBLE_DEVICES=-1"):
        find_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert find_gpus() == []

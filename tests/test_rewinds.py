"""Which batch makes an update, after rewinds."""

from llm_jax.safety.rewinds import Rewind, Rewinds


def test_batches_are_left_out_and_none_comes_twice(tmp_path):
    rewinds = Rewinds(tmp_path / "rewinds.json")
    assert [rewinds.batch_number(step) for step in range(5)] == [0, 1, 2, 3, 4]
    rewinds.add(Rewind(spike=9, to=4, batches=10), write=True)
    assert [rewinds.batch_number(step) for step in range(3, 7)] == [3, 14, 15, 16]
    rewinds.add(Rewind(spike=12, to=6, batches=2), write=True)
    assert [rewinds.batch_number(step) for step in range(3, 9)] == [3, 14, 15, 18, 19, 20]
    rewinds.add(Rewind(spike=8, to=2, batches=1), write=True)  # further back than before
    numbers = [rewinds.batch_number(step) for step in range(50)]
    assert numbers == sorted(set(numbers)) and numbers[:6] == [0, 1, 3, 4, 15, 16]


def test_they_outlive_the_process(tmp_path):
    path = tmp_path / "rewinds.json"
    rewinds = Rewinds(path)
    assert rewinds.to_clear is None
    rewinds.add(Rewind(spike=9, to=4, batches=10), write=True)
    assert Rewinds(path).done == [Rewind(spike=9, to=4, batches=10)]
    assert Rewinds(path).to_clear == 4  # it died before the checkpoints beyond 4 were removed
    rewinds.clear(write=True)
    assert Rewinds(path).to_clear is None and Rewinds(path).batch_number(4) == 14
    other = Rewinds(path)
    other.add(Rewind(spike=20, to=16, batches=1), write=False)  # in the other processes of the run
    assert other.to_clear == 16 and Rewinds(path).to_clear is None

"""The cache of shards among processes: made once, whole or not there, within its limit."""

import multiprocessing
import os
import signal
import time

import pytest

from vim.data.shard_cache import ShardCache

fork = multiprocessing.get_context("fork")  # as torch's loaders do


def filled(letter, size=100):
    return lambda path: path.write_bytes(letter * size)


def kept(cache):
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_made_once_by_however_many_processes(tmp_path):
    made = tmp_path / "made"

    ready = fork.Barrier(4, timeout=60)

    def work(pipe):
        def write(path):
            with made.open("a") as file:
                file.write("once\n")
            path.write_bytes(b"half")
            time.sleep(0.3)
            path.write_bytes(b"whole")

        ready.wait()
        pipe.send(bytes(ShardCache(tmp_path / "cache").open("x.arrow", write)))

    pipes = [fork.Pipe(duplex=False) for _ in range(4)]
    processes = [fork.Process(target=work, args=(out,)) for _, out in pipes]
    for process in processes:
        process.start()
    for _, out in pipes:
        out.close()  # so that nobody waits for what a dead process would have sent
    assert [got.recv() for got, _ in pipes] == [b"whole"] * 4
    for process in processes:
        process.join()
    assert made.read_text() == "once\n"


def test_the_least_recently_opened_give_way(tmp_path):
    cache = ShardCache(tmp_path, limit=200)
    for letter in ("a", "b"):
        cache.open(f"{letter}.arrow", filled(letter.encode()))
    assert bytes(cache.open("a.arrow", filled(b"?"))) == b"a" * 100  # it is still there, and newer than b now
    cache.open("c.arrow", filled(b"c"))
    assert kept(cache) == ["a.arrow", "c.arrow"]
    assert bytes(cache.open("b.arrow", filled(b"B"))) == b"B" * 100
    assert bytes(cache.open("big.arrow", filled(b"d", 300))) == b"d" * 300  # larger than the limit: alone
    assert kept(cache) == ["big.arrow"]
    assert len(ShardCache(tmp_path).open("e.arrow", filled(b"e"))) == 100  # no limit
    assert kept(cache) == ["big.arrow", "e.arrow"]


def test_a_removed_file_stays_for_a_process_that_reads_it(tmp_path):
    cache = ShardCache(tmp_path, limit=150)
    here, there = fork.Pipe()

    def work():
        content = cache.open("a.arrow", filled(b"a"))
        there.send("opened")
        there.recv()
        there.send(bytes(content))

    process = fork.Process(target=work)
    process.start()
    there.close()
    assert here.recv() == "opened"
    cache.open("b.arrow", filled(b"b"))
    assert kept(cache) == ["b.arrow"]
    here.send("go on")
    assert here.recv() == b"a" * 100
    process.join()


def test_a_process_killed_in_the_midst_leaves_nothing_that_counts(tmp_path):
    cache = ShardCache(tmp_path)

    def write(path):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    for name in ("a.arrow", "b.arrow"):
        process = fork.Process(target=cache.open, args=(name, write))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert kept(cache) == ["a.arrow.part", "b.arrow.part"]
    assert bytes(cache.open("a.arrow", filled(b"a"))) == b"a" * 100
    assert kept(cache) == ["a.arrow"]


def test_what_is_being_written_is_left_alone(tmp_path):
    cache = ShardCache(tmp_path, limit=10)

    def write(path):
        path.write_bytes(b"half")
        ShardCache(tmp_path, limit=10).open("b.arrow", filled(b"b"))  # as another process that makes room
        path.write_bytes(path.read_bytes() + b" and half")

    assert bytes(cache.open("a.arrow", write)) == b"half and half"


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    synced, cache = [], ShardCache(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.readlink(f"/proc/self/fd/{file}"), kept(cache))))
    cache.open("a.arrow", filled(b"a"))
    assert synced == [(str(tmp_path / "a.arrow.part"), ["a.arrow.part"])]


def test_a_failure_leaves_nothing_and_is_told(tmp_path):
    cache = ShardCache(tmp_path)

    def write(path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cache.open("a.arrow", write)
    assert kept(cache) == []

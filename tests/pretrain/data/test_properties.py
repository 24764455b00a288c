"""What holds of every mixture, permutation and cut shard, whatever their numbers."""

import io
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from core.failures import DataError
from core.shards.tar import list_shard
from pretrain.data.order import CYCLE_LENGTH, Cycle, permuted
from tests.pretrain.data.test_order import Sizes, order_of

quick = settings(deadline=None, max_examples=60)
weights = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda found: sum(found) > 1e-3)
keys = st.integers(0, 2**64 - 1)


@quick
@given(weights, keys)
def test_shares_are_met_to_one_slot_and_who_is_due_one_is_drawn(mixture, key):
    cycle = Cycle(mixture, key)
    drawn = Counter(cycle.draw(number)[0] for number in range(CYCLE_LENGTH))
    shares = np.array(mixture) / sum(mixture)
    for choice, share in enumerate(shares):
        assert abs(drawn[choice] - share * CYCLE_LENGTH) < 1
        assert drawn[choice] >= 1 or share * CYCLE_LENGTH < 1
        assert drawn[choice] == 0 or share > 0


@quick
@given(weights, keys, st.integers(0, 10**9))
def test_a_cycle_knows_its_past_without_a_look_at_it(mixture, key, first):
    cycle = Cycle(mixture, key)
    start = first * CYCLE_LENGTH
    seen = {k: first * int(slots) for k, slots in enumerate(cycle.slots)}
    for number in range(start, start + CYCLE_LENGTH):
        choice, before = cycle.draw(number)
        assert before == seen[choice]
        seen[choice] += 1


@quick
@given(st.integers(1, 400), keys)
def test_a_permutation_takes_every_index_once_whatever_its_key(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


sides = st.sampled_from([(64, 64), (160, 90), (90, 160), (128, 96), (96, 64)])
sources = st.lists(
    st.tuples(st.sampled_from([0.5, 1, 3]), st.lists(sides, min_size=1, max_size=12)), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=10)
@given(sources, st.integers(0, 99), st.sampled_from([1, 3, 8]))
def test_every_source_is_drawn_and_every_sample_once_an_epoch_of_its_bucket(mixture, seed, batch_size):
    order = order_of(
        *[("t2i", weight, Sizes(*sizes)) for weight, sizes in mixture], seed=seed, batch_size=batch_size
    )
    came: dict[tuple[int, int], list[int]] = {}
    for step in range(2000 // batch_size):
        plan = order.plan(step)
        for place in range(batch_size):
            draw = order.draw(plan, place)
            came.setdefault((draw.source, plan.bucket), []).append(draw.ordinal)
    assert {source for source, _ in came} == set(range(len(mixture)))
    for (source, bucket), ordinals in came.items():
        size = order.counts(source)[bucket]
        stream = iter(ordinals)
        epochs = [tuple(islice(stream, size)) for _ in range(-(-len(ordinals) // size))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert len({frozenset(epoch) for epoch in epochs if len(epoch) == size}) <= 1


names = st.text("ab.é/", min_size=1, max_size=6).map(lambda name: f"x{name}y") | st.just("long" * 40)
members = st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=5)


@settings(deadline=None, max_examples=150)
@given(members, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.data())
def test_a_cut_shard_lists_its_first_members_or_is_an_error(tmp_path_factory, contents, form, data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in contents:
            info = tarfile.TarInfo(name if form != tarfile.USTAR_FORMAT else name[:90])
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    body = buffer.getvalue()
    path = tmp_path_factory.getbasetemp() / "property.tar"
    path.write_bytes(body)
    whole = list_shard(path)
    assert whole.cut is None
    length = data.draw(st.integers(0, len(body)))
    path.write_bytes(body[:length])
    try:
        cut = list_shard(path)
    except DataError as error:
        assert "not an uncompressed tar file" in str(error)
        return
    # A name that stands twice is its last member, which a cut may take away: then it is the one before.
    last = {name: content for name, content in contents}
    flat = [(key, suffix, member) for key, files in cut.samples for suffix, member in files.items()]
    known = {(key, suffix): member for key, files in whole.samples for suffix, member in files.items()}
    for key, suffix, member in flat:
        assert (key, suffix) in known
        assert member == known[key, suffix] or len(last) < len(contents)
    assert [key for key, _ in cut.samples] == [key for key, _ in whole.samples][: len(cut.samples)]
    assert cut.cut is not None or [*cut.samples] == [*whole.samples]

from hypothesis import given
from hypothesis import strategies as st

from d2scale.memory.alignment import corresponding

words = st.text("abc", max_size=9)


def longest_common_subsequence(ones: str, twos: str) -> int:
    best = [[0] * (len(twos) + 1) for _ in range(len(ones) + 1)]
    for i, one in enumerate(ones):
        for j, two in enumerate(twos):
            same = one == two
            best[i + 1][j + 1] = best[i][j] + 1 if same else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


@given(words, words)
def test_as_many_as_possible_correspond_in_order(ones, twos):
    partners = corresponding(ones, twos)
    assert all(ones[one] == twos[two] for two, one in partners.items())
    in_order = sorted(partners.items())
    assert sorted(partners.values()) == [one for _, one in in_order]
    assert len(partners) == longest_common_subsequence(ones, twos)


def test_the_last_rounds_of_a_loop_correspond():
    assert corresponding("pxyzq", "pxyxyzq") == {0: 0, 3: 1, 4: 2, 5: 3, 6: 4}

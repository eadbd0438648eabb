/*
 * What x86-TSO promises between two CPUs, here of different nodes.
 *
 * Message passing: a store is not seen before an earlier one of the same CPU.
 * Store buffering: with a fence between a CPU's store and its load, two CPUs never both miss the other's store.
 */
#include "check.h"

#define MAX_PAIRS 8
/* Locations per round of store buffering: a page that came over the network is used this often. */
#define BATCH 32

struct mp {
	struct page data, flag;
	uint64_t seen; /* different values that the reader saw; its own */
};

/* Fewest rounds of each direction, whatever the time. */
#define LEAST 8

static void pass_messages(struct member *member)
{
	struct mp *mp = member->shared;
	if (member->index == 0) {
		uint64_t i = 0;
		/* The flag must keep moving until the reader has seen enough of it. */
		while (!team_failed() && !(team_stop() && __atomic_load_n(&mp->seen, __ATOMIC_ACQUIRE) >= LEAST)) {
			i++;
			mp->data.value = i;
			mp->flag.value = i; /* TSO: not before the line above */
			/* Without a pause the writer would rarely give the pages away. */
			for (unsigned pause = 0; pause < 50; pause++)
				__builtin_ia32_pause();
		}
		member->done = i;
		return;
	}
	uint64_t last = 0, reads = 0, different = 0;
	while (!team_failed() && !(team_stop() && different >= LEAST)) {
		uint64_t flag = mp->flag.value;
		uint64_t data = mp->data.value; /* TSO: not before the line above */
		reads++;
		if (data < flag)
			fail("CPU %d saw flag %lu but data %lu", member->cpu, flag, data);
		if (flag < last)
			fail("CPU %d saw flag %lu after %lu", member->cpu, flag, last);
		different += flag != last;
		last = flag;
		/* Published once or a few times: a page of its own moves for it. */
		if (different == LEAST)
			__atomic_store_n(&mp->seen, different, __ATOMIC_RELEASE);
	}
	member->done = different;
}

void test_message_passing(void)
{
	int pairs[MAX_PAIRS][2];
	int count = topology_pairs(pairs, MAX_PAIRS);
	uint64_t values = 0;
	double begin = now();
	for (int i = 0; pairs_left(&count, i, begin); i++) {
		struct member members[2];
		struct mp *mp = pages(sizeof *mp);
		team_run(members, pairs[i], 2, pass_messages, mp, 0.5 * scale / count);
		values += members[1].done;
	}
	report("%d pairs of CPUs, %lu values seen in order, %.2f s", count, values, now() - begin);
}

struct sb {
	struct page arrived[2];
	/* x and y share a page in even rounds and have one each in odd ones. */
	_Alignas(PAGE) volatile uint64_t here[PAGE / 8];
	_Alignas(PAGE) volatile uint64_t there[PAGE / 8];
	_Alignas(PAGE) uint64_t saw[2][PAGE / 8]; /* what each read; compared after the round */
};

/* Both CPUs are in round `round`. False when the test ends. */
static bool meet(struct member *member, uint64_t round)
{
	struct sb *sb = member->shared;
	unsigned spins = 0;
	sb->arrived[member->index].value = round;
	while (sb->arrived[!member->index].value < round) {
		if (team_failed())
			return false;
		relax(&spins);
	}
	return true;
}

/* Set by member 0 for both, before a meeting: how many rounds there are in all. */
static volatile uint64_t last_round;

static void buffer_stores(struct member *member)
{
	struct sb *sb = member->shared;
	int me = member->index;
	for (uint64_t round = 1;; round++) {
		if (me == 0 && team_stop() && round > LEAST && last_round == 0)
			last_round = round;
		/* Two meetings a round: before it, and before the results are compared. */
		if (!meet(member, 2 * round - 1))
			return;
		volatile uint64_t *x = sb->here;
		volatile uint64_t *y = round % 2 ? sb->there : sb->here + BATCH;
		volatile uint64_t *mine = me ? y : x, *other = me ? x : y;
		for (int i = 0; i < BATCH; i++) {
			mine[i] = round;
			/* Two ways to order a store before a load. */
			if (i % 2)
				__asm__ volatile("mfence" : : : "memory");
			else
				__asm__ volatile("lock orq $0, (%%rsp)" : : : "memory", "cc");
			sb->saw[me][i] = other[i];
		}
		if (!meet(member, 2 * round))
			return;
		for (int i = 0; me == 0 && i < BATCH; i++) {
			if (sb->saw[0][i] < round && sb->saw[1][i] < round)
				fail("round %lu: both CPUs read the old value (%lu and %lu)", round,
				     sb->saw[0][i], sb->saw[1][i]);
		}
		member->done = round * BATCH;
		if (last_round != 0 && round >= last_round)
			return;
	}
}

void test_store_buffering(void)
{
	int pairs[MAX_PAIRS][2];
	int count = topology_pairs(pairs, MAX_PAIRS);
	uint64_t rounds = 0;
	double begin = now();
	for (int i = 0; pairs_left(&count, i, begin); i++) {
		struct member members[2];
		struct sb *sb = pages(sizeof *sb);
		last_round = 0;
		team_run(members, pairs[i], 2, buffer_stores, sb, 0.5 * scale / count);
		rounds += members[0].done;
	}
	report("%d pairs of CPUs, %lu times never both old, %.2f s", count, rounds, now() - begin);
}

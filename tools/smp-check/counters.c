/* Counters that must come out exact, whoever writes them from wherever. */
#include "check.h"

/* A team stops when its time is over, but not before each member did this much; nor does it do more than that. */
#define LEAST 20
#define MOST 2000000

struct counter {
	struct page shared;
	struct page slots; /* one 8-byte slot per member, all in one page */
};

static uint64_t total(const struct member *members, int count)
{
	uint64_t sum = 0;
	for (int i = 0; i < count; i++)
		sum += members[i].done;
	return sum;
}

static bool goes_on(uint64_t done)
{
	return done < LEAST ? !team_failed() : done < MOST && !team_stop();
}

static void add(struct member *member)
{
	struct counter *counter = member->shared;
	uint64_t done = 0;
	for (; goes_on(done); done++)
		__asm__ volatile("lock addq $1, %0" : "+m"(counter->shared.value) : : "memory", "cc");
	member->done = done;
}

static void exchange(struct member *member)
{
	struct counter *counter = member->shared;
	uint64_t done = 0;
	uint64_t seen = 0;
	while (goes_on(done)) {
		/* A failed exchange leaves the value found in `seen`: the retry wins if it is quick. */
		uint64_t next = seen + 1;
		bool won;
		__asm__ volatile("lock cmpxchgq %3, %1"
				 : "=@ccz"(won), "+m"(counter->shared.value), "+a"(seen)
				 : "r"(next)
				 : "memory");
		done += won;
		if (won)
			seen = next;
	}
	member->done = done;
}

static void store(struct member *member)
{
	struct counter *counter = member->shared;
	volatile uint64_t *slot = (volatile uint64_t *)&counter->slots + member->index;
	uint64_t done = 0;
	for (; goes_on(done); done++) {
		uint64_t value = *slot;
		if (value != done) {
			fail("CPU %d wrote %lu to its own slot and read back %lu", member->cpu, done, value);
			break;
		}
		*slot = value + 1;
	}
	member->done = done;
}

static void count_with(work body, const char *what)
{
	int cpus[MAX_TEAM];
	struct member members[MAX_TEAM];
	struct counter *counter = pages(sizeof *counter);
	int count = topology_spread(cpus, MAX_TEAM);
	double begin = now();
	team_run(members, cpus, count, body, counter, 0.4 * scale);
	uint64_t expected = total(members, count);
	if (body == store) {
		for (int i = 0; i < count; i++) {
			uint64_t slot = ((volatile uint64_t *)&counter->slots)[i];
			if (slot != members[i].done)
				fail("CPU %d's slot is %lu after %lu stores", cpus[i], slot, members[i].done);
		}
	} else if (counter->shared.value != expected) {
		fail("the counter is %lu after %lu %s", counter->shared.value, expected, what);
	}
	report("%d threads on %d nodes, %lu %s, %.2f s", count, topology_nodes_of(cpus, count), expected, what,
	       now() - begin);
}

void test_lock_add(void)
{
	count_with(add, "increments");
}

void test_cmpxchg(void)
{
	count_with(exchange, "successful exchanges");
}

void test_side_by_side(void)
{
	count_with(store, "plain stores in one page");
}

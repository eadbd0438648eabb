/* Two CPUs that wake each other: by a futex, and by two pipes. */
#include "check.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_PAIRS 8
#define LEAST 10
/* A partner that does not answer for this long never will. */
#define LIMIT_SECONDS 20

/* Added to the futex word by member 0 to end the game. */
#define STOP 0x80000000u

struct table {
	struct page word; /* how many turns were taken; the parity says whose turn it is */
	int pipes[2][2];  /* pipes[i]: from member i to the other */
};

static volatile uint32_t *word_of(struct member *member)
{
	return (volatile uint32_t *)&((struct table *)member->shared)->word;
}

/* Waits until `word` is no longer `seen`. */
static bool wait_for_change(struct member *member, volatile uint32_t *word, uint32_t seen)
{
	struct timespec limit = { LIMIT_SECONDS, 0 };
	if (syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, &limit, NULL, 0) == 0 || errno == EAGAIN ||
	    errno == EINTR)
		return true;
	fail("CPU %d waited for the futex at %u and got \"%s\"; the word is now %u", member->cpu, seen,
	     strerror(errno), *word);
	return false;
}

static void play_futex(struct member *member)
{
	volatile uint32_t *word = word_of(member);
	uint32_t turn = (uint32_t)member->index;
	for (;; turn += 2) {
		uint32_t seen;
		while ((seen = __atomic_load_n(word, __ATOMIC_ACQUIRE)) % 2 != turn % 2) {
			if (team_failed() || !wait_for_change(member, word, seen))
				return;
		}
		if (seen & STOP)
			return;
		if (seen != turn) {
			fail("CPU %d expected turn %u and found %u", member->cpu, turn, seen);
			return;
		}
		bool over = member->index == 0 && turn >= LEAST && team_stop();
		__atomic_store_n(word, (turn + 1) | (over ? STOP : 0), __ATOMIC_RELEASE);
		syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
		member->done++;
		if (over)
			return;
	}
}

struct message {
	uint64_t number; /* UINT64_MAX ends the game */
	uint64_t body[120];
};

static uint64_t body_word(uint64_t number, int i)
{
	return (number + seed) * 0x9e3779b97f4a7c15u + (uint64_t)i;
}

static bool send_message(struct member *member, int fd, uint64_t number)
{
	struct message message = { .number = number };
	for (int i = 0; i < 120; i++)
		message.body[i] = body_word(number, i);
	/* Below PIPE_BUF: whole or not at all. */
	ssize_t wrote = write(fd, &message, sizeof message);
	if (wrote != (ssize_t)sizeof message)
		fail("CPU %d wrote %zd of %zu bytes into the pipe", member->cpu, wrote, sizeof message);
	return wrote == (ssize_t)sizeof message;
}

static bool receive_message(struct member *member, int fd, uint64_t *number)
{
	struct message message;
	for (size_t got = 0; got < sizeof message;) {
		struct pollfd ready = { .fd = fd, .events = POLLIN };
		if (poll(&ready, 1, LIMIT_SECONDS * 1000) != 1) {
			if (!team_failed())
				fail("CPU %d got nothing through the pipe for %d s", member->cpu, LIMIT_SECONDS);
			return false;
		}
		ssize_t part = read(fd, (char *)&message + got, sizeof message - got);
		if (part <= 0) {
			fail("CPU %d cannot read the pipe: %s", member->cpu, strerror(errno));
			return false;
		}
		got += (size_t)part;
	}
	for (int i = 0; i < 120; i++) {
		if (message.body[i] != body_word(message.number, i)) {
			fail("CPU %d read word %d of message %lu as %#lx instead of %#lx", member->cpu, i,
			     message.number, message.body[i], body_word(message.number, i));
			return false;
		}
	}
	*number = message.number;
	return true;
}

static void play_pipe(struct member *member)
{
	struct table *table = member->shared;
	int out = table->pipes[member->index][1], in = table->pipes[!member->index][0];
	uint64_t number;
	for (uint64_t i = 0;; i++) {
		if (member->index == 0) {
			bool over = i >= LEAST && team_stop();
			if (!send_message(member, out, over ? UINT64_MAX : i) || over ||
			    !receive_message(member, in, &number))
				return;
		} else if (!receive_message(member, in, &number) || number == UINT64_MAX ||
			   !send_message(member, out, number)) {
			return;
		}
		if (number != i) {
			fail("CPU %d got message %lu instead of %lu", member->cpu, number, i);
			return;
		}
		member->done++;
	}
}

static void play(work body)
{
	int pairs[MAX_PAIRS][2];
	int count = topology_pairs(pairs, MAX_PAIRS);
	uint64_t trips = 0;
	double begin = now();
	for (int i = 0; pairs_left(&count, i, begin); i++) {
		struct member members[2];
		struct table *table = pages(sizeof *table);
		if (body == play_pipe && (pipe(table->pipes[0]) != 0 || pipe(table->pipes[1]) != 0)) {
			fail("cannot make a pipe: %s", strerror(errno));
			return;
		}
		team_run(members, pairs[i], 2, body, table, 0.4 * scale / count);
		trips += members[0].done;
		for (int j = 0; body == play_pipe && j < 4; j++)
			close(table->pipes[j / 2][j % 2]);
	}
	double seconds = now() - begin;
	report("%d pairs of CPUs, %lu round trips of %.0f us, %.2f s", count, trips,
	       trips ? seconds / (double)trips * 1e6 : 0.0, seconds);
}

void test_futex(void)
{
	play(play_futex);
}

void test_pipe(void)
{
	play(play_pipe);
}

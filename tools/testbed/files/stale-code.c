/*
 * Does this emulator run code that is no longer in memory? A whole machine's program, for QEMU's -kernel (multiboot,
 * 32-bit, no paging): CPU 0 patches five bytes of code as Linux does (text_poke_bp: int3 over the first byte, then the
 * other four, then the first) while all other CPUs run them. After each of the three writes it waits until every other
 * CPU has executed a serializing instruction (cpuid), as Linux does by interrupts. From the third wait on no CPU may meet
 * an int3, nor the code of before: by Intel's manual (volume 3, "Handling Self- and Cross-Modifying Code") and AMD's.
 *
 * Command line: the number of CPUs and that of patches. Says on the debug port (0xe9), every hundred patches and in the end:
 *
 *   cpus=N patches=N expected_int3=N stale_int3=N stale_code=N
 *
 * expected_int3: breakpoints met while a patch was under way, which is how it should be. stale_int3: patches after which
 * a CPU met an int3 although memory held none. stale_code: patches after which a CPU ran what had been there before.
 */
#include <stdint.h>

#define MAX_CPUS 16
/* Calls of the patched code by each CPU after a patch, before the next. */
#define CALLS 20

__asm__(
    ".section .text.head, \"ax\"\n"
    ".align 4\n"
    ".long 0x1badb002, 0, -0x1badb002\n"
    ".globl start\n"
    "start:\n"
    "  cli\n"
    "  movl $stacks + 4096, %esp\n"
    "  lgdt gdt_pointer\n"
    "  ljmp $8, $1f\n"
    "1: movw $16, %ax\n"
    "  movw %ax, %ds; movw %ax, %es; movw %ax, %ss\n"
    "  pushl %ebx\n"
    "  call first_cpu\n"
    /* What other CPUs start with, copied to 0x8000: real mode. */
    ".globl trampoline, trampoline_end\n"
    ".code16\n"
    "trampoline:\n"
    "  cli\n"
    "  xorw %ax, %ax\n"
    "  movw %ax, %ds\n"
    "  lgdtl 0x8000 + (low_gdt_pointer - trampoline)\n"
    "  movl %cr0, %eax\n"
    "  orb $1, %al\n"
    "  movl %eax, %cr0\n"
    "  ljmpl $8, $other_start\n"
    ".align 4\n"
    "low_gdt_pointer: .word 23; .long 0x8000 + (low_gdt - trampoline)\n"
    ".align 8\n"
    "low_gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff\n"
    "trampoline_end:\n"
    ".code32\n"
    "other_start:\n"
    "  movw $16, %ax\n"
    "  movw %ax, %ds; movw %ax, %es; movw %ax, %ss\n"
    "  movl $1, %eax\n"
    "  lock xaddl %eax, cpus\n"
    "  movl %eax, %ecx\n"
    "  incl %ecx\n"
    "  shll $12, %ecx\n"
    "  leal stacks(%ecx), %esp\n"
    "  pushl %eax\n"
    "  call other_cpu\n"
    /* int3: the frame is eip, cs, eflags. Goes on behind the patched bytes. */
    ".globl on_int3\n"
    "on_int3:\n"
    "  pushal\n"
    "  pushl 32(%esp)\n"
    "  call met_int3\n"
    "  addl $4, %esp\n"
    "  popal\n"
    "  movl $after_site, (%esp)\n"
    "  iretl\n"
    ".align 8\n"
    "gdt_pointer: .word 23; .long gdt\n"
    ".align 8\n"
    "gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff\n"
    /* A page of code. `site` is a jump over, or a no-op; `neighbour` is code of that page which is not patched: there is
       always some in a kernel's page. */
    ".section .text.page, \"ax\"\n"
    ".align 4096\n"
    ".globl run_site, site, neighbour\n"
    "run_site:\n"
    "  xorl %eax, %eax\n"
    "  jmp site\n"
    ".align 64\n"
    "site: .byte 0x0f, 0x1f, 0x44, 0x00, 0x00\n"
    "after_site:\n"
    "  incl %eax\n"
    "  ret\n"
    "jump_target:\n"
    "  addl $2, %eax\n"
    "  ret\n"
    ".align 64\n"
    "neighbour: ret\n"
    ".align 4096\n"
    ".previous\n");

extern uint32_t run_site(void);
extern void neighbour(void);
extern volatile uint8_t site[5];
extern uint8_t trampoline[], trampoline_end[];
extern void on_int3(void);

uint8_t stacks[MAX_CPUS][4096] __attribute__((aligned(4096)));
volatile uint32_t cpus = 1;

/* A counter of one CPU, alone in its cache line. */
struct counter {
    volatile uint32_t value;
    uint8_t pad[60];
} __attribute__((aligned(64)));

/* How often each CPU has called the patched code and then serialized. */
static struct counter rounds[MAX_CPUS];
static struct counter expected_int3[MAX_CPUS];
/* Whether each CPU met an int3, or the code of before, since the last patch was done. */
static struct counter stale_int3[MAX_CPUS], stale_code[MAX_CPUS];
/* 0 while a patch is under way, else what `run_site` must return: 1 of the no-op, 2 of the jump. */
static volatile uint32_t settled = 1;
/* The number of patches begun. */
static volatile uint32_t patch_number;

static void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static void say(const char *text) {
    while (*text) outb(0xe9, (uint8_t)*text++);
}

static void say_number(const char *name, uint32_t value) {
    char digits[11];
    int at = 10;
    digits[at] = 0;
    do digits[--at] = (char)('0' + value % 10);
    while (value /= 10);
    say(name);
    say(digits + at);
}

/* The next decimal number of a text, 0 if there is none. */
static uint32_t number_of(const char **text) {
    uint32_t value = 0;
    while (**text == ' ') ++*text;
    for (; **text >= '0' && **text <= '9'; ++*text) value = value * 10 + (uint32_t)(**text - '0');
    return value;
}

static void serialize(void) {
    uint32_t a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d)::"memory");
}

static void load_idt(void) {
    static uint64_t idt[4];
    static struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) pointer;
    uint32_t handler = (uint32_t)on_int3;
    idt[3] = (uint64_t)((handler & 0xffff0000) | 0x8e00) << 32 | 8 << 16 | (handler & 0xffff);
    pointer.limit = sizeof idt - 1;
    pointer.base = (uint32_t)idt;
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

static uint32_t this_cpu(void) {
    uint32_t stack;
    __asm__("movl %%esp, %0" : "=r"(stack));
    return (stack - (uint32_t)stacks) / 4096;
}

void met_int3(uint32_t eip) {
    uint32_t cpu = this_cpu();
    if (settled && *(volatile uint8_t *)(eip - 1) != 0xcc)
        stale_int3[cpu].value = 1;
    else
        expected_int3[cpu].value++;
}

void other_cpu(uint32_t cpu) {
    load_idt();
    for (;;) {
        uint32_t number = patch_number, wanted = settled;
        uint32_t got = run_site();
        neighbour();
        /* On an int3 `got` is that of the no-op. */
        if (wanted && got != wanted && !stale_int3[cpu].value && settled == wanted && patch_number == number)
            stale_code[cpu].value = 1;
        serialize();
        rounds[cpu].value++;
    }
}

/* Waits until every other CPU has made so many whole rounds from now. */
static void wait_rounds(uint32_t count) {
    uint32_t before[MAX_CPUS];
    for (uint32_t cpu = 1; cpu < cpus; cpu++) before[cpu] = rounds[cpu].value;
    for (uint32_t cpu = 1; cpu < cpus; cpu++)
        /* The first that ends may have begun earlier. */
        while (rounds[cpu].value - before[cpu] < count + 1) __asm__ volatile("pause");
}

static void patch(const uint8_t code[5]) {
    site[0] = 0xcc;
    wait_rounds(1);
    *(volatile uint32_t *)(site + 1) = *(const uint32_t *)(code + 1);
    wait_rounds(1);
    site[0] = code[0];
    wait_rounds(1);
}

static void apic(uint32_t reg, uint32_t value) { *(volatile uint32_t *)(0xfee00000 + reg) = value; }

static void pause_for(uint32_t turns) {
    while (turns--) outb(0x80, 0);
}

static void start_others(uint32_t wanted) {
    for (uint8_t *from = trampoline, *to = (uint8_t *)0x8000; from < trampoline_end;) *to++ = *from++;
    apic(0xf0, 0x1ff);
    apic(0x300, 0xc4500); /* INIT, then start-up at 0x8000, to all others */
    pause_for(20000);
    apic(0x300, 0xc4608);
    while (cpus < wanted) __asm__ volatile("pause");
}

static void report(uint32_t patches, uint32_t bad_int3, uint32_t bad_code) {
    uint32_t expected = 0;
    for (uint32_t cpu = 1; cpu < cpus; cpu++) expected += expected_int3[cpu].value;
    say_number("cpus=", cpus);
    say_number(" patches=", patches);
    say_number(" expected_int3=", expected);
    say_number(" stale_int3=", bad_int3);
    say_number(" stale_code=", bad_code);
    say("\n");
}

void first_cpu(const uint32_t *boot) {
    static const uint8_t nop[5] = {0x0f, 0x1f, 0x44, 0x00, 0x00};
    /* To jump_target, behind `incl %eax; ret`. */
    static const uint8_t jump[5] = {0xe9, 0x02, 0x00, 0x00, 0x00};
    uint32_t bad_int3 = 0, bad_code = 0;
    /* Multiboot: the command line's address is word 4; it begins with the program's name. */
    const char *words = (const char *)boot[4];
    while (*words && *words != ' ') words++;
    uint32_t wanted = number_of(&words), patches = number_of(&words);
    if (wanted > MAX_CPUS) wanted = MAX_CPUS;
    load_idt();
    start_others(wanted);
    for (uint32_t n = 0; n < patches; n++) {
        const uint8_t *code = n % 2 ? nop : jump;
        patch_number = n + 1;
        settled = 0;
        wait_rounds(1);
        patch(code);
        settled = n % 2 ? 1 : 2;
        wait_rounds(CALLS);
        uint32_t met = 0, ran = 0;
        for (uint32_t cpu = 1; cpu < cpus; cpu++) {
            met |= stale_int3[cpu].value;
            ran |= stale_code[cpu].value;
            stale_int3[cpu].value = stale_code[cpu].value = 0;
        }
        bad_int3 += met;
        bad_code += ran;
        if ((n + 1) % 100 == 0 || n + 1 == patches) report(n + 1, bad_int3, bad_code);
    }
    outb(0xf4, 0); /* isa-debug-exit */
    for (;;) __asm__ volatile("hlt");
}

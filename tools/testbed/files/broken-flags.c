/*
 * Does this emulator keep a CPU's flags whole? A whole machine's program, for QEMU's -kernel (multiboot, 32-bit, no paging,
 * one CPU): an addition, a compare-and-exchange of 8 bytes, then PUSHF. CMPXCHG8B changes the zero flag and no other (SDM
 * volume 2A), so the others are those of the addition, and only flags that exist can be pushed.
 *
 * Says on the debug port (0xe9) the flags of two sums, that of the operand 0xa0800480 and that of 1, in hexadecimal:
 *
 *   flags=XXXXXXXX XXXXXXXX
 *
 * 00000082 (sign) and 00000002 (none) are right.
 */
#include <stdint.h>

__asm__(
    ".section .text.head, \"ax\"\n"
    ".align 4\n"
    ".long 0x1badb002, 0, -0x1badb002\n"
    ".globl start, exchange\n"
    "start:\n"
    "  cli\n"
    "  movl $stack + 4096, %esp\n"
    "  call main\n"
    "1: hlt\n"
    "  jmp 1b\n"
    /* uint32_t exchange(volatile uint64_t *value, uint32_t addend): the flags after addition and exchange. POPF before them,
       so that no operands of other instructions are left over. */
    "exchange:\n"
    "  pushl %ebx\n"
    "  pushl %esi\n"
    "  pushl %edi\n"
    "  movl 16(%esp), %esi\n"
    "  movl 20(%esp), %edi\n"
    "  xorl %eax, %eax\n"
    "  xorl %edx, %edx\n"
    "  movl $1, %ebx\n"
    "  movl $2, %ecx\n"
    "  pushl $2\n"
    "  popfl\n"
    "  addl %edi, %eax\n"
    "  cmpxchg8b (%esi)\n"
    "  pushfl\n"
    "  popl %eax\n"
    "  cld\n"
    "  popl %edi\n"
    "  popl %esi\n"
    "  popl %ebx\n"
    "  ret\n");

uint8_t stack[4096] __attribute__((aligned(16)));
extern uint32_t exchange(volatile uint64_t *value, uint32_t addend);

static void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static void say(const char *text) {
    while (*text) outb(0xe9, (uint8_t)*text++);
}

static void say_hex(uint32_t value) {
    for (int shift = 28; shift >= 0; shift -= 4) outb(0xe9, (uint8_t) "0123456789abcdef"[value >> shift & 15]);
}

void main(void) {
    /* Never what EAX and EDX hold, so that the exchange fails and the zero flag stays clear. */
    static volatile uint64_t value = 7ull << 32;
    say("flags=");
    say_hex(exchange(&value, 0xa0800480));
    say(" ");
    say_hex(exchange(&value, 1));
    say("\n");
    outb(0xf4, 0); /* isa-debug-exit */
    for (;;) __asm__ volatile("hlt");
}

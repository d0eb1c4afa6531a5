# Interrupt entries and the gate by which ring 3 asks for what only ring 0 may do.
#
# Every entry from ring 3 starts at the end of the vCPU's Local page (local.rs), so masking RSP
# finds that page. Entries count and leave; ring 3 judges. Offsets are checked in local.rs.

.set LOCAL_EVENTS, 0
.set LOCAL_TIMER_COUNT, 8
.set LOCAL_TIMER_TSC, 16
.set LOCAL_WAKES, 24
.set LOCAL_STRAYS, 32
.set LOCAL_LINES, 96
.set DEVICE_LINES, 18
.set LAPIC_EOI, 0xfee000b0
.set FLAG_IF, 0x200
.set GATE, 0x50554c00            # that no code has in EAX by chance

.section .text
.code64

.macro count_and_leave counter
    pushq %rcx
    movq %rsp, %rcx
    andq $-4096, %rcx
    incq \counter(%rcx)
    incq LOCAL_EVENTS(%rcx)
    movl $LAPIC_EOI, %ecx
    movl $0, (%rcx)
    popq %rcx
    iretq
.endm

.globl timer_entry
timer_entry:
    pushq %rax
    pushq %rdx
    pushq %rcx
    movq %rsp, %rcx
    andq $-4096, %rcx
    rdtsc
    movl %eax, LOCAL_TIMER_TSC(%rcx)
    movl %edx, LOCAL_TIMER_TSC+4(%rcx)
    incq LOCAL_TIMER_COUNT(%rcx)
    incq LOCAL_EVENTS(%rcx)
    movl $LAPIC_EOI, %ecx
    movl $0, (%rcx)
    popq %rcx
    popq %rdx
    popq %rax
    iretq

.globl wake_entry
wake_entry:
    count_and_leave LOCAL_WAKES

.globl stray_entry
stray_entry:
    count_and_leave LOCAL_STRAYS

# One for each virtio device, 64 bytes apart (idt.rs).
.balign 64
.globl device_entries
device_entries:
    .set line, LOCAL_LINES
    .rept DEVICE_LINES
    .balign 64
    count_and_leave line
    .set line, line + 8
    .endr

# A spurious interrupt must not be acknowledged.
.globl spurious_entry
spurious_entry:
    pushq %rcx
    movq %rsp, %rcx
    andq $-4096, %rcx
    incq LOCAL_STRAYS(%rcx)
    incq LOCAL_EVENTS(%rcx)
    popq %rcx
    iretq

# The gate is `ud2` with EAX = GATE + what; arguments in RDI, RSI, RDX; result in RAX; RCX, RDX, R8
# are lost. Exceptions reach ring 0 on every KVM; a software KVM refuses `int n` in ring 3. An
# interrupt gate, so it begins with interrupts masked. Numbers are those of gate.rs.
.globl gate_entry
gate_entry:
    subl $GATE, %eax
    cmpl $3, %eax
    ja invalid_opcode
    addq $2, (%rsp)             # past the ud2
    cmpl $1, %eax
    jb gate_halt
    je gate_wrmsr
    cmpl $2, %eax
    je gate_cpuid
    andq $~FLAG_IF, 16(%rsp)    # 3: RDI != 0 unmasks interrupts in ring 3
    testl %edi, %edi
    jz 1f
    orq $FLAG_IF, 16(%rsp)
1:  iretq

gate_halt:                      # unless the word at RDI is no longer RSI
    cmpq %rsi, (%rdi)
    jne 1f
    sti                         # takes effect after hlt: no wake-up can be lost
    hlt
    cli
1:  iretq

gate_wrmsr:
    movl %edi, %ecx
    movl %esi, %eax
    movq %rsi, %rdx
    shrq $32, %rdx
    wrmsr
    iretq

gate_cpuid:                     # leaf EDI, subleaf ESI, four words to RDX
    pushq %rbx
    movq %rdx, %r8
    movl %edi, %eax
    movl %esi, %ecx
    cpuid
    movl %eax, (%r8)
    movl %ebx, 4(%r8)
    movl %ecx, 8(%r8)
    movl %edx, 12(%r8)
    popq %rbx
    iretq

invalid_opcode:
    pushq $0
    pushq $6
# An exception is a bug here or in the VMM: go on in ring 3 at fault_main(vector, error, rip, cr2).
fault:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movq $fault_main, (%rsp)
    movq $0x3b, 8(%rsp)
    movq $0x3002, 16(%rsp)
    movq 24(%rsp), %rax
    andq $-16, %rax
    subq $136, %rax             # past the red zone, and as a call would have left it
    movq %rax, 24(%rsp)
    movq $0x33, 32(%rsp)
    iretq

# 32 entries of 16 bytes each; those without an error code push a zero.
.balign 16
.globl exception_entries
exception_entries:
    .set vector, 0
    .rept 32
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    pushq $0
    .endif
    pushq $vector
    jmp fault
    .set vector, vector + 1
    .endr

# From whatever a loader gives us to `ring3_main`, for the BSP and for every AP.
#
# Two ways in: `pvh_start` (32-bit, paging off, EBX = hvm_start_info) and `linux64_start` (the
# Linux 64-bit boot protocol, RSI = boot_params). APs come in through `trampoline`. All meet at
# `enter`, which gives the vCPU its TSS and goes to ring 3 for good. Ring 0 may be emulated an
# instruction at a time, so there is as little of it as will do, and no SSE.
#
# To ring3_main: RDI = APIC id, RSI = boot structure, RDX = 0 for PVH, 1 for Linux, 2 for an AP.

.set KERNEL_CODE, 0x08
.set KERNEL_DATA, 0x10
.set KERNEL_CODE32, 0x18
.set USER_DATA, 0x30 | 3
.set USER_CODE, 0x38 | 3
.set FIRST_TSS, 0x40
.set CR0_BITS, 0x80010033       # PG WP NE ET MP PE
.set CR4_BITS, 0x620            # PAE OSFXSR OSXMMEXCPT
.set IA32_EFER, 0xc0000080
.set EFER_LME, 0x100
.set TRAMPOLINE, 0x8000
.set FLAGS_MASKED, 0x3002       # IOPL 3, IF clear

.section .note.pvh, "a", @note
.balign 4
    .long 4, 8, 18              # "Xen\0", 8 bytes, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

.macro to_long_mode target
    movl $CR4_BITS, %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $IA32_EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl $CR0_BITS, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CODE, $\target
.endm

.section .boot, "ax"
.code32
.globl pvh_start
pvh_start:
    rdtsc                       # when it all began
    movl %eax, born
    movl %edx, born + 4
    cli
    cld
    lgdtl gdt_pointer
    to_long_mode pvh_long

.code64
pvh_long:
    movl %ebx, %esi
    xorl %edx, %edx
    jmp enter

.globl linux64_start
linux64_start:
    rdtsc
    movl %eax, born
    movl %edx, born + 4
    cli
    cld
    lgdt gdt_pointer
    movl $CR4_BITS, %eax
    movq %rax, %cr4
    movl $pml4, %eax
    movq %rax, %cr3
    movl $CR0_BITS, %eax
    movq %rax, %cr0
    movl $1, %edx
    jmp enter

ap_long:
    xorl %esi, %esi
    movl $2, %edx

enter:
    movl $KERNEL_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %eax, %fs
    movl %eax, %gs
    movl $0xfee00020, %eax      # our index is the local APIC id
    movl (%rax), %edi
    shrl $24, %edi

    movl %edi, %eax             # the ring-0 stack grows down from the end of our Local page
    incl %eax
    shll $12, %eax
    leaq LOCALS(%rax), %rsp

    movl %edi, %ebx             # our TSS: RSP0, and an I/O bitmap of zeros for ring 3
    shll $11, %ebx
    addl $TSS, %ebx
    movq %rsp, 4(%rbx)
    movw $104, 102(%rbx)

    movl %edi, %ecx             # its descriptor: limit 0x7ff, available 64-bit TSS
    shll $4, %ecx
    leaq gdt_tss(%rcx), %r8
    movl %ebx, %eax
    andl $0xffffff, %eax
    shlq $16, %rax
    movabsq $0x00008900000007ff, %r9
    orq %r9, %rax
    shrl $24, %ebx
    shlq $56, %rbx
    orq %rbx, %rax
    movq %rax, (%r8)
    movq $0, 8(%r8)
    addl $FIRST_TSS, %ecx
    ltr %cx
    lidt idt_pointer

    movl %edi, %eax
    incl %eax
    shll $17, %eax
    leaq USER_STACKS-8(%rax), %rax  # as a call would have left it
    pushq $USER_DATA
    pushq %rax
    pushq $FLAGS_MASKED
    pushq $USER_CODE
    pushq $ring3_main
    iretq

# Copied to TRAMPOLINE, where an AP starts in real mode.
.section .rodata.trampoline, "a"
.balign 16
.globl trampoline
.globl trampoline_end
.code16
trampoline:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl gdt_pointer_16 - trampoline
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CODE32, $(TRAMPOLINE + trampoline_32 - trampoline)
.code32
trampoline_32:
    movl $KERNEL_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    to_long_mode ap_long
.balign 4
gdt_pointer_16:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
.code64

.section .data
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 ring 0 code
    .quad 0x00cf93000000ffff    # 0x10 ring 0 data
    .quad 0x00cf9b000000ffff    # 0x18 ring 0 code, 32 bits
    .quad 0, 0
    .quad 0x00cff3000000ffff    # 0x30 ring 3 data
    .quad 0x00affb000000ffff    # 0x38 ring 3 code
gdt_tss:
    .fill 2 * 16, 8, 0          # 0x40 a TSS for each vCPU
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad IDT
.balign 8
.globl born
born:
    .quad 0                     # TSC at the first instruction

# The first 4 GiB, one to one, in 2 MiB pages that ring 3 may use. Made by the assembler, so that
# no ring-0 loop has to. Device pages are uncached: the probe's at 0xd0000000, and from 0xfe000000
# up. Entries above 4 GiB are filled in by paging.rs.
.balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
.globl pdpt
pdpt:
    .quad pd + 7, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:
    .set page, 0
    .rept 2048
    .if page == 0xd0000000 || page >= 0xfe000000
    .quad page + 0x9f           # and PCD, PWT
    .else
    .quad page + 0x87           # present, writable, user, 2 MiB
    .endif
    .set page, page + 0x200000
    .endr

/*
 * Four faults of QEMU's x86 emulation, mended in the running program: a TCG plugin, so that a
 * stock QEMU can be used. Without it a nested guest at work ends within seconds of it (triple
 * faults, hangs), or takes its host along. Found in 10.0.2; guests of 11.1.3 end so too.
 *
 * 1. cpu_clear_ignne() (target/i386/tcg/fpu_helper.c, cpu_set_fpus) clears a bit of
 *    first_cpu->env.hflags2. It is called by FXRSTOR and XRSTOR on *every* CPU's thread, with no
 *    lock and no atomic operation, so it also puts the first CPU's other bits back to what they
 *    were a moment ago. Two of them say whether interrupts are held off (GIF) and whether page
 *    tables are nested (NPT): the first CPU takes interrupts between #VMEXIT and STGI, with a
 *    guest's GS, or walks its own page tables as a guest's. Mended by making it return at once:
 *    the bit belongs to the FERR# of DOS (CR0.NE = 0), which no kernel here uses.
 *
 * 2. helper_vmrun() (target/i386/tcg/system/svm_helper.c), where it injects an interrupt, puts the
 *    vector into exception_index, delivers it, and leaves it there. When another thread next asks
 *    this CPU to stop, the main loop takes it for an exception that is still to be delivered, and
 *    delivers it again, IF or not. Mended by going back to the main loop with no exception, as
 *    its translation does one instruction later anyway.
 *
 * 3. helper_vmrun() also sets a bit of the CPU's interrupt_request, which other threads change
 *    under the big lock: without it, and in 10.0.2 by no atomic operation, so an
 *    interrupt that another thread raises at that moment is lost, and a host's CPU with no tick
 *    of its own stands still until somebody else's interrupt. Mended by taking the lock; whatever
 *    leaves helper_vmrun() by a jump to the main loop has it released there.
 *
 * 4. cpu_vmexit() copies EVENTINJ to EXITINTINFO. Of an event that was delivered only the valid bit is gone by
 *    then; type and vector are there still, where a processor leaves zeroes. KVM since 6.14 goes by the type
 *    (svm_check_emulate_instruction): an exit for a device's page, right after an exception or an NMI was injected, is
 *    taken for one in the middle of a delivery, which ends the guest ("suberror 3"). Mended at the STGI that follows each
 *    #VMEXIT: what is not valid becomes zero.
 *
 * The program exports all its symbols to plugins. If what is to be mended isn't as it was, this
 * fails, and QEMU doesn't start.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define RET 0xc3

/* include/tcg/helper-info.h; only its beginning matters. */
struct helper_info {
    void *func;
    const char *name;
};

extern struct helper_info helper_info_vmrun;
extern struct helper_info helper_info_stgi;
extern void helper_vmrun(void *env, int aflag, int next_eip_addend);
extern void helper_stgi(void *env);
extern void cpu_physical_memory_rw(uint64_t address, void *buffer, uint64_t length, int is_write);
extern void cpu_clear_ignne(void);
extern void bql_lock_impl(const char *file, int line);
extern void bql_unlock(void);
extern void cpu_loop_exit_noexc(void *cpu) __attribute__((noreturn));
extern __thread void *current_cpu;

/* APM volume 2, appendix B: EXITINTINFO in the control area. */
#define EXITINTINFO 0x88
#define EXITINTINFO_VALID (1u << 31)

EXPORTED int qemu_plugin_version = 4;

/* Physical address of what this CPU ran last; CPUs are threads. */
static __thread uint64_t vmcb;

static void sound_vmrun(void *env, int aflag, int next_eip_addend)
{
    /* VMRUN has it in RAX, the first of the registers, with which the CPU's state begins. */
    vmcb = *(const uint64_t *)env;
    bql_lock_impl(__FILE__, __LINE__);
    helper_vmrun(env, aflag, next_eip_addend);
    bql_unlock();
    cpu_loop_exit_noexc(current_cpu);
}

static void sound_stgi(void *env)
{
    uint32_t info;

    helper_stgi(env);
    if (vmcb == 0)
        return;
    cpu_physical_memory_rw(vmcb + EXITINTINFO, &info, sizeof info, 0);
    if (info != 0 && (info & EXITINTINFO_VALID) == 0) {
        info = 0;
        cpu_physical_memory_rw(vmcb + EXITINTINFO, &info, sizeof info, 1);
    }
    /* Its page may be anybody's from now on. */
    vmcb = 0;
}

static int return_at_once(void (*function)(void))
{
    uintptr_t page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    void *page = (void *)((uintptr_t)function & ~(page_size - 1));

    if (mprotect(page, page_size, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
        return -1;
    *(volatile uint8_t *)(uintptr_t)function = RET;
    return mprotect(page, page_size, PROT_READ | PROT_EXEC);
}

EXPORTED int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
    (void)id, (void)info, (void)argc, (void)argv;
    if (helper_info_vmrun.func != (void *)helper_vmrun ||
        strcmp(helper_info_vmrun.name, "vmrun") != 0 ||
        helper_info_stgi.func != (void *)helper_stgi ||
        strcmp(helper_info_stgi.name, "stgi") != 0) {
        fprintf(stderr, "sound: this QEMU describes its helpers in another way\n");
        return -1;
    }
    if (return_at_once(cpu_clear_ignne) != 0) {
        perror("sound: writing to this QEMU's program");
        return -1;
    }
    helper_info_vmrun.func = (void *)sound_vmrun;
    helper_info_stgi.func = (void *)sound_stgi;
    return 0;
}

// What can happen to the repository while a machine is backed up, and to the clock between two backups.
import Glibc
import Testing

@Suite struct BackupTargetFaultTests {
    /// A point is there, and something has changed since.
    private func prepared(_ repository: String? = nil) throws -> Site {
        var site = try Site()
        if let repository { site.repository = "\(repository)/repository" }
        try site.requireBackup()
        try site.machine.io("write -P 7 3M 24M", "discard 29M 1M")
        return site
    }

    /// The run has failed without a trace on the hypervisor; the next one is incremental and right.
    private func expectRecovery(_ site: Site, _ failed: Outcome, _ reason: String) throws {
        #expect(failed.status == 1 && failed.text.contains(reason), "\(failed)")
        #expect(try site.machine.leftovers() == [] && site.machine.bitmaps().count == 1)
        try site.machine.limit(bytesPerSecond: 0)
        #expect(try site.points.count == 1)
        try run("diskgate", "verify", "--repository", site.repository)
        let now = try site.machine.snapshot("now")
        let next = try site.backup()
        #expect(next.status == 0 && next.text.contains("incremental"), "\(next)")
        #expect(try site.halves == [])
        #expect(try site.restores("latest", to: now) && site.doctor().status == 0)
    }

    @Test(.enabled(if: Mount.isPossible))
    func `a repository that gets full fails the run, and nothing else`() throws {
        let folder = try Folder()
        let mount = try Mount(folder, "small", megabytes: 64)
        let site = try prepared(mount.path)
        let failed = try site.duringBackup(endsIt: true) {
            try mount.fill()
            try site.machine.limit(bytesPerSecond: 0)
        }
        #expect(try site.halves == [])
        // Without room, it is not even begun.
        let early = try site.backup()
        #expect(early.status == 1 && early.text.contains("more space"), "\(early)")
        mount.makeRoom()
        try expectRecovery(site, failed, "o space left")
    }

    @Test func `a repository that is moved away fails the run, and is put right when it is back`() throws {
        let site = try prepared()
        let aside = site.folder.file("aside")
        let failed = try site.duringBackup(endsIt: true) {
            rename(site.repository, aside)
            try site.machine.limit(bytesPerSecond: 0)
        }
        // What was written lies where nobody finds it now.
        let left = try site.doctor("--fix")
        #expect(left.status == 1 && left.text.contains("repository.partial"), "\(left)")
        rename(aside, site.repository)
        let fixed = try site.doctor("--fix")
        #expect(fixed.status == 0, "\(fixed)")
        #expect(try site.halves == [])
        try expectRecovery(site, failed, "repository")
    }

    @Test(.enabled(if: Mount.isPossible))
    func `a repository whose file system goes away fails the run`() throws {
        let folder = try Folder()
        let mount = try Mount(folder, "away", megabytes: 96)
        let site = try prepared(mount.path)
        // A second mount of the same file system keeps it.
        let keeper = folder.file("keeper")
        mkdir(keeper, 0o755)
        try run("mount", "--bind", mount.path, keeper)
        defer { umount2(keeper, Int32(MNT_DETACH)) }
        let failed = try site.duringBackup(endsIt: true) {
            umount2(mount.path, Int32(MNT_DETACH))
            try site.machine.limit(bytesPerSecond: 0)
        }
        #expect(try site.doctor("--fix").status == 1)
        try run("mount", "--bind", keeper, mount.path)
        try expectRecovery(site, failed, "repository")
    }

    @Test(.enabled(if: Mount.isPossible))
    func `a repository that is removed is made anew, with a full point`() throws {
        let site = try prepared()
        let failed = try site.duringBackup(endsIt: true) {
            try run("rm", "-rf", site.repository)
            try site.machine.limit(bytesPerSecond: 0)
        }
        #expect(failed.status == 1, "\(failed)")
        #expect(try site.machine.leftovers() == [])
        let now = try site.machine.snapshot("now")
        let next = try site.backup()
        #expect(next.status == 0 && next.text.contains("the machine's first point"), "\(next)")
        #expect(try site.restores("latest", to: now))
        // It may have been unmounted only: another one in its place does not show that nothing was left of the point.
        let left = try site.doctor("--fix")
        #expect(left.status == 1 && left.text.contains("another repository"), "\(left)")
        #expect(try site.doctor("--forget", left.lines[0].split(separator: " ").map(String.init)[1]).status == 0)
        #expect(try site.doctor().status == 0)
    }

    @Test(.enabled(if: Mount.isPossible))
    func `a repository that cannot be written fails the run at once`() throws {
        let folder = try Folder()
        let mount = try Mount(folder, "fixed", megabytes: 96)
        let site = try prepared(mount.path)
        try mount.remount(readOnly: true)
        let failed = try site.backup()
        #expect(try site.doctor().status == 0)
        try mount.remount(readOnly: false)
        try expectRecovery(site, failed, "ead-only")
    }

    @Test(.enabled(if: Mount.isPossible))
    func `a repository whose file system fails in the middle fails the run`() throws {
        let folder = try Folder()
        let image = folder.file("ext4")
        let place = folder.file("failing")
        mkdir(place, 0o755)
        try run("sh", "-c", "truncate -s 128M \(image) && mkfs.ext4 -q -F -E lazy_itable_init=0 \(image)")
        func mounted() throws { try run("mount", "-o", "loop,errors=remount-ro", image, place) }
        try mounted()
        defer { umount2(place, Int32(MNT_DETACH)) }
        let site = try prepared(place)
        let failed = try site.duringBackup(endsIt: true) {
            // As ext4 itself does when its disk fails.
            try run("mount", "-o", "remount,abort", place)
            try site.machine.limit(bytesPerSecond: 0)
        }
        #expect(try site.machine.leftovers() == [])
        umount2(place, 0)
        #expect(try attempt("e2fsck", "-f", "-y", image).status <= 1)
        try mounted()
        #expect(try site.doctor("--fix").status == 0)
        try expectRecovery(site, failed, "ead-only")
    }

    @Test func `a clock that is set back changes neither the order of points nor what is in them`() throws {
        let site = try Site()
        let source = site.folder.file("clock.c")
        let program = """
            #define _GNU_SOURCE
            #include <dlfcn.h>
            #include <stdlib.h>
            #include <sys/time.h>
            #include <time.h>
            int clock_gettime(clockid_t clock, struct timespec *now) {
                int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
                int result = real(clock, now);
                if (clock == CLOCK_REALTIME) now->tv_sec += atol(getenv("CLOCK_SHIFT"));
                return result;
            }
            time_t time(time_t *at) {
                struct timespec now;
                clock_gettime(CLOCK_REALTIME, &now);
                if (at) *at = now.tv_sec;
                return now.tv_sec;
            }
            int gettimeofday(struct timeval *restrict at, void *restrict zone) {
                struct timespec now;
                clock_gettime(CLOCK_REALTIME, &now);
                *at = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
                return 0;
            }
            """
        try run("sh", "-c", "cat >\(source) <<'END'\n\(program)\nEND")
        try run("gcc", "-shared", "-fPIC", "-o", site.folder.file("clock.so"), source, "-ldl")
        var moments: [String] = []
        // Ahead by two days, right, a day behind: each point is older than the one before.
        for (round, hours) in [48, 0, -24, -24].enumerated() {
            try site.machine.io(changes(round))
            moments.append(try site.machine.snapshot("moment-\(round)"))
            let outcome = try site.backup(
                "--keep-last", "3",
                environment: ["LD_PRELOAD=\(site.folder.file("clock.so"))", "CLOCK_SHIFT=\(hours * 3600)"])
            #expect(outcome.status == 0 && outcome.text.contains(round == 0 ? "full" : "incremental"), "\(outcome)")
        }
        let names = try site.points
        #expect(names.map { String($0.prefix(6)) } == ["000002", "000003", "000004"])
        let times = names.map { $0.split(separator: "-")[1] }
        #expect(times[0] > times[1], "the clock was not set back: \(names)")
        for sequence in 2...4 { #expect(try site.restores("\(sequence)", to: moments[sequence - 1])) }
        #expect(try site.restores("latest", to: moments[3]))
        try run("diskgate", "verify", "--repository", site.repository)
    }
}

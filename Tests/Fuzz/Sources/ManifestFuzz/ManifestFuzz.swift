// Fuzzes the JSON files of a repository: manifests, machines, marks, the description; then what works with them.
import Block
import FuzzSupport
import Glibc
import LinuxIO

@testable import Backup

@main
struct ManifestFuzz {
    static func main() throws {
        let folder = FuzzFolder()
        let path = "\(folder.path)/repository"
        let repository = try Repository.create(at: path)
        let machine = try repository.enroll(id: "id-1", name: "web")
        let place = "repository/vms/\(machine.directory)"
        fuzz { input in
            var choices = Choices(input)
            let kind = choices.byte() & 3
            let rest = choices.rest()
            switch kind {
            case 0:
                folder.write("\(place)/points/000001-a.json", rest)
                checkPoints(repository, machine, "\(path)/vms/\(machine.directory)/points/000001-a.json")
            case 1:
                mkdir("\(path)/vms/other", 0o700)
                folder.write("repository/vms/other/machine.json", rest)
                let machines = try? repository.machines()
                require(machines?.contains { $0.name == machine.name } == true, "another machine is gone")
                _ = try? repository.machine(named: "other")
            case 2:
                folder.write("repository/vms/other.json", rest)
                _ = try? readJSON(PointMark.self, from: "\(path)/vms/other.json")
            default:
                mkdir("\(folder.path)/described", 0o700)
                folder.write("described/\(RepositoryDescription.fileName)", rest)
                _ = try? RepositoryDescription.read(from: "\(folder.path)/described")
            }
        }
    }

    private static func checkPoints(_ repository: Repository, _ machine: RepositoryMachine, _ file: String) {
        guard var manifest = try? PointManifest.read(file) else {
            require((try? repository.points(of: machine)) == nil, "a manifest that cannot be read is a point")
            return
        }
        guard let points = try? repository.points(of: machine), let point = points.first else {
            return require(false, "a manifest that can be read is no point")
        }
        for disk in manifest.disks {
            for name in [disk.directory, disk.file, disk.hashes.file] {
                require(!name.contains("/") && name != "..", "\(name) leads elsewhere")
            }
        }
        for text in ["latest", "1", "2026-11-21", point.uuid] { _ = try? repository.find(text, of: machine) }
        var rule = RetentionRule()
        (rule.last, rule.daily, rule.weekly, rule.monthly, rule.yearly) = (1, 1, 1, 1, 1)
        require(!rule.reasons(for: points).isEmpty, "a rule that keeps one point keeps none")
        for disk in manifest.disks { _ = try? repository.open(point, disk: disk.id) }
        _ = point.description
        _ = manifest.disks.compactMap(\.checked)
        _ = try? manifest.damages()
        guard let bytes = try? manifest.encoded() else { return require(false, "a manifest cannot be written") }
        let again = try? parseJSON(PointManifest.self, bytes, "again")
        require((try? again?.hasValidChecksum()) == true, "a manifest that was written has another checksum")
    }
}

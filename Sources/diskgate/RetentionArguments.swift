// Which restore points stay: the --keep options of `diskgate backup` and `diskgate prune`.
import ArgumentParser
import Backup

/// Which points stay.
struct RetentionArguments: ParsableArguments {
    @Option(help: ArgumentHelp("Keep so many of the newest points.", valueName: "n"))
    var keepLast = 0

    @Option(help: ArgumentHelp("Keep the newest point of so many days.", valueName: "n"))
    var keepDaily = 0

    @Option(help: ArgumentHelp("Keep the newest point of so many weeks.", valueName: "n"))
    var keepWeekly = 0

    @Option(help: ArgumentHelp("Keep the newest point of so many months.", valueName: "n"))
    var keepMonthly = 0

    @Option(help: ArgumentHelp("Keep the newest point of so many years.", valueName: "n"))
    var keepYearly = 0

    /// The rule; nil where nothing was said.
    var rule: RetentionRule? {
        var rule = RetentionRule()
        (rule.last, rule.daily, rule.weekly, rule.monthly, rule.yearly) = (
            keepLast, keepDaily, keepWeekly, keepMonthly, keepYearly
        )
        return rule == RetentionRule() ? nil : rule
    }

    func validate() throws {
        let counts = [keepLast, keepDaily, keepWeekly, keepMonthly, keepYearly]
        if counts.contains(where: { $0 < 0 }) { throw ValidationError("Counts of points to keep are not below 0.") }
    }
}
